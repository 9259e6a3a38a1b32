"""The cpu backend of the log-prob ops: csrc/logprob/cpu.cpp, in C++ with vector instructions, and GEMMs.

float32 products are torch's. Those of bfloat16 values are our own (csrc/common/gemm) where the processor can; other inputs
are widened tile by tile.

Shapes: n tokens x v columns of a tile, H hidden; a GEMM is m x k by k x n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..op import Kernel, Written, nothing
from . import divergence_tiles, linear_tiles, tiles


class GemmCall(NamedTuple):
    """out = a @ b or, with ``add``, out += a @ b; float32 accumulators, subnormal numbers count as 0."""

    a: Tensor  # (m, k) bfloat16, or float32 that is rounded to bfloat16 first; any strides, as b
    b: Tensor  # (k, n)
    out: Written  # (m, n) float32
    add: bool


GEMM = Kernel("gemm_bf16", GemmCall, nothing, backends=("cpu",))


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, v) = hidden (n, H) @ weight (v, H).T"""
    if is_ours(hidden.dtype):
        GEMM("cpu", GemmCall(hidden, weight.t(), out, False))
    else:
        torch.mm(hidden.float(), weight.float().t(), out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (m, H) = a (m, k) @ b (k, H), or out += a @ b. With bfloat16 b, a is rounded to bfloat16."""
    if is_ours(b.dtype):
        GEMM("cpu", GemmCall(a, b, out, accumulate))
    elif accumulate:
        torch.addmm(out, a, b.float(), out=out)
    else:
        torch.mm(a, b.float(), out=out)


def is_ours(dtype: torch.dtype) -> bool:
    """Whether inputs of this dtype are multiplied by our own GEMM, whose rows have the same bits in any company."""
    return dtype == torch.bfloat16 and extension.chosen_isa() in ("avx512_bf16", "amx_bf16")


ENGINE = tiles.Engine(
    backend="cpu",
    logits=logits,
    add_product=add_product,
    empty=lambda like, shape, dtype: extension.empty(shape, dtype),
    tile_bytes=8 << 20,
    tokens=1024,
    invariant_columns=2048,
    invariant_tokens=lambda dtype: 0 if is_ours(dtype) else 64,
)
linear_tiles.implement(ENGINE, "CPU")
divergence_tiles.implement(ENGINE, "CPU")
