"""Matrix products for the tile loop on NVIDIA GPUs: torch's GEMM, with float32 results of 16-bit inputs.

A tile of logits is float32 from the GEMM's accumulators (a 16-bit logit has too coarse a step for a log-prob); its gradient
is rounded once to the dtype of the inputs, as that of eager logits is, and the products with it are summed in float32. The
tile is written once and read once forward; backward it is written, read, and its narrower gradient written and read twice.

Shapes: n tokens x v columns of a tile, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import tiles

TILE_BYTES = 512 << 20
TOKENS = 8192  # a tile; from 2,048 on a GEMM is bound by arithmetic and re-reads the head seldom
INVARIANT_TOKENS, INVARIANT_COLUMNS = 1024, 32768


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, v) = hidden (n, H) @ weight (v, H).T, in float32."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.mm(hidden, weight.t(), torch.float32, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (m, H) = a (m, k) @ b (k, H), or out += that, in float32; a and b of one dtype."""
    if accumulate and a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, torch.float32, out=out)
    elif a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, torch.float32, out=out)


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the device of ``like``, not initialised."""
    return like.new_empty(shape, dtype=dtype)


def invariant_tokens(dtype: torch.dtype) -> int:
    """How many rows every GEMM has where bits must not depend on the company."""
    return INVARIANT_TOKENS


def engine(
    backend: str, gradient: Callable[..., Tensor], forward: Callable[..., Any] | None = None
) -> tiles.Engine:
    """What a backend for GPUs gives to the tile loop: its own gradient of a tile and forward, the products from here."""
    return tiles.Engine(
        backend,
        logits,
        add_product,
        empty,
        TILE_BYTES,
        TOKENS,
        INVARIANT_COLUMNS,
        invariant_tokens,
        gradient,
        forward,
    )
