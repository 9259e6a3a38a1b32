"""The tiles of the Triton kernel of linear_logprobs (r1kernels.tuning says how the tables beside this file are read).

The size that chooses an entry is the number of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ... import tuning

FOLDER = Path(__file__).parent


class Tile(NamedTuple):
    """The configuration of a matrix kernel."""

    tokens: int
    columns: int
    depth: int
    group: int  # blocks of tokens that go through the vocabulary together
    warps: int
    stages: int
    descriptors: bool  # hidden and weight come by tensor descriptors, in persistent programs


def linear_forward(device: torch.device, kind: str, tokens: int | None) -> Tile:
    """The tile of the forward-only kernel of linear_logprobs.

    kind: "plain", "rich" (a cap, or statistics) or "float32". tokens: N; None: whatever N is, the same tile.
    """
    return choose("linear_forward", *tuning.name_and_capability(device), kind, tokens)


def choose(kernel: str, device: str, capability: tuple[int, int], kind: str, tokens: int | None) -> Tile:
    """The tile for a device of this name and capability."""
    found = tuning.entry(FOLDER, kernel, device, capability, kind, "tokens", tokens)
    return Tile._make((*found["tile"], *(found[name] for name in Tile._fields[3:])))
