"""The Triton backend of kept rows of the head: its ops. Triton is imported at the first launch, never before."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kept_head


@kept_head.PRODUCTS.implement("triton")
def products(call: kept_head.ProductsCall) -> Tensor:
    raw = kept_head.shape(call)
    products_into(call, raw)
    return raw


@kept_head.PRODUCTS_BACKWARD.implement("triton")
def backward(call: kept_head.ProductsBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    for_hidden, for_weight, for_bias = kept_head.backward_shapes(call)
    backward_into(call, for_hidden, for_weight.zero_(), for_bias.zero_())
    return for_hidden, for_weight, for_bias


def products_into(call: kept_head.ProductsCall, raw: Tensor) -> None:
    """``products`` into a tensor that the caller gives."""
    from . import triton_kept_kernels as kernels

    entries = call.ids.shape[0]
    with torch.cuda.device_of(call.hidden):
        if entries:
            kernels.products_kernel[(-(-entries // kernels.ENTRIES.value),)](
                call.hidden,
                call.weight,
                call.bias,
                call.ids,
                call.tokens,
                raw,
                entries,
                call.weight.shape[0],
                call.first,
                call.hidden.shape[1],
                num_warps=kernels.WARPS,
                enable_fp_fusion=True,
            )


def backward_into(
    call: kept_head.ProductsBackwardCall, for_hidden: Tensor, for_weight: Tensor, for_bias: Tensor
) -> None:
    """``backward`` into tensors that the caller gives: those of weight and bias hold 0, those not needed nothing."""
    from . import triton_kept_kernels as kernels

    (tokens, width), entries = call.hidden.shape, call.ids.shape[0]
    blocks = -(-width // kernels.WIDTH.value)
    sizes = (entries, call.weight.shape[0], call.first, width)
    with torch.cuda.device_of(call.hidden):
        if call.need_hidden and tokens:
            kernels.gradient_of_hidden_kernel[(tokens * blocks,)](
                call.grad,
                call.weight,
                call.ids,
                call.offsets,
                for_hidden,
                *sizes,
                num_warps=kernels.WARPS,
                enable_fp_fusion=True,
            )
        if (call.need_weight or call.need_bias) and entries:
            kernels.gradient_of_weight_kernel[(entries * (blocks if call.need_weight else 1),)](
                call.grad,
                call.hidden,
                call.ids,
                call.tokens,
                call.order,
                for_weight if call.need_weight else None,
                for_bias if call.need_bias else None,
                *sizes,
                num_warps=kernels.WARPS,
                enable_fp_fusion=True,
            )
