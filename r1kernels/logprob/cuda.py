"""The cuda backend of the log-prob ops: csrc/logprob/cuda_*.cuh, in C++ for NVIDIA GPUs, and torch's GEMM.

A tile of logits is float32 from the GEMM's accumulators (a 16-bit logit has too coarse a step for a log-prob); its gradient
is rounded once to the dtype of the inputs, as that of eager logits is, and the products with it are summed in float32. The
tile is written once and read once forward; backward it is written, read, and its narrower gradient written and read twice.

Shapes: n tokens x v columns of a tile, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import divergence_tiles, linear_tiles, tiles, token


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


def _gradient(
    engine: tiles.Engine, tile: Tensor, rows: token.Rows, dtype: torch.dtype, upstream: token.Upstream
) -> Tensor:
    """The gradient of the raw logits of a tile, in the dtype that the GEMMs take."""
    if dtype == tile.dtype:
        return tiles.gradient_over_tile(engine, tile, rows, dtype, upstream)
    grad = tiles.scratch(engine, tile, tile.shape[0], tile.shape[1], dtype)
    call = token.RowsBackwardIntoCall(tile.unsqueeze(0), rows, upstream, grad.unsqueeze(0))
    token.BACKWARD_INTO("cuda", call)
    return grad


ENGINE = tiles.Engine(
    backend="cuda",
    logits=logits,
    add_product=add_product,
    empty=lambda like, shape, dtype: like.new_empty(shape, dtype=dtype),
    tile_bytes=512 << 20,
    tokens=8192,  # from 2,048 on a GEMM is bound by arithmetic and re-reads the head seldom
    invariant_columns=32768,
    invariant_tokens=lambda dtype: 1024,
    gradient=_gradient,
    one_dtype=True,
)
linear_tiles.implement(ENGINE, "CUDA")
divergence_tiles.implement(ENGINE, "CUDA")
