"""The tiles of the Triton kernels of the experts (r1kernels.tuning says how the tables beside this file are read).

The size that chooses an entry is the mean number of rows an expert has, S / E. It comes in steps of powers of two, so that
another number of tokens seldom means another kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ... import tuning

FOLDER = Path(__file__).parent
KERNELS = ("rows", "rows_transposed", "up", "down_backward", "weight_gradient")


class Tile(NamedTuple):
    """The configuration of a kernel of ``triton_gemm.py``."""

    rows: int
    columns: int
    depth: int
    group: int  # row tiles that go through the columns together
    warps: int
    stages: int
    # weights, and rows that need no gather, come by tensor descriptors, in persistent programs
    descriptors: bool


def tile(kernel: str, device: torch.device, dtype: torch.dtype, rows: int, experts: int) -> Tile:
    """The tile of ``kernel``, one of KERNELS, for so many routed rows."""
    return choose(kernel, *tuning.name_and_capability(device), dtype, -(-rows // experts))


def choose(
    kernel: str, device: str, capability: tuple[int, int], dtype: torch.dtype, rows_an_expert: int
) -> Tile:
    """The tile for a device of this name and capability."""
    kind = "float32" if dtype == torch.float32 else "half"
    bucket = 1 << (rows_an_expert - 1).bit_length() if rows_an_expert > 1 else 1
    found = tuning.entry(FOLDER, kernel, device, capability, kind, "rows_an_expert", bucket)
    return Tile._make((*found["tile"], *(found[name] for name in Tile._fields[3:])))
