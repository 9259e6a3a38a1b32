"""The matrix products of the tile loop on a CPU, float32 results from inputs of any dtype.

torch has them for float32 alone. Of bfloat16 values the op gemm_bf16_cpu (csrc/common/gemm/bf16.h) computes them where the
processor can; other inputs are widened tile by tile.

    gemm_bf16_cpu(a, b, out, add) -> ()
        a (m, k), b (k, n): bfloat16, or float32 that is rounded to bfloat16 first; any strides
        out (m, n) float32: a @ b is written or added; float32 accumulators, subnormal numbers count as 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from . import ops

ops.library.define("gemm_bf16_cpu(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()")


@torch.library.register_fake("r1kernels::gemm_bf16_cpu", lib=ops.library)
def _fake(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    return None


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, v) = hidden (n, H) @ weight (v, H).T"""
    if is_ours(hidden.dtype):
        ops.namespace.gemm_bf16_cpu(hidden, weight.t(), out, False)
    else:
        torch.mm(hidden.float(), weight.float().t(), out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out (m, H) = a (m, k) @ b (k, H), or out += a @ b. With bfloat16 b, a is rounded to bfloat16."""
    if is_ours(b.dtype):
        ops.namespace.gemm_bf16_cpu(a, b, out, accumulate)
    elif accumulate:
        torch.addmm(out, a, b.float(), out=out)
    else:
        torch.mm(a, b.float(), out=out)


def is_ours(dtype: torch.dtype) -> bool:
    """Whether inputs of this dtype are multiplied by gemm_bf16_cpu, whose rows have the same bits in any company."""
    return dtype == torch.bfloat16 and extension.chosen_isa() == "avx512_bf16"
