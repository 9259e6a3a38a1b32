"""The Triton backend of the experts: grouped_gemm and moe_experts, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from . import experts
from .triton_products import (
    LowRank,
    Rows,
    ascending,
    clear_rest,
    combine,
    down_backward_into,
    multiply,
    up_into,
    weight_gradient,
)


@experts.GEMM_FORWARD.implement("triton")
def grouped_gemm(call: experts.GemmCall) -> Tensor:
    x, weight, offsets, transposed, batch_invariant = call
    bounds = ascending(offsets, x.shape[0])
    rows = Rows(bounds, x.shape[0], x.dtype, tail=True, batch_invariant=batch_invariant)
    return multiply("rows_transposed" if transposed else "rows", x, weight, rows)


@experts.GEMM_BACKWARD.implement("triton")
def grouped_gemm_backward(call: experts.GemmBackwardCall) -> tuple[Tensor, Tensor]:
    grad, x, weight, offsets, transposed, need_x, need_weight = call
    rows = Rows(ascending(offsets, x.shape[0]), x.shape[0], x.dtype, tail=True)
    left, right = (x, grad) if transposed else (grad, x)
    return (
        multiply("rows" if transposed else "rows_transposed", grad, weight, rows)
        if need_x
        else _nothing(x, x),
        weight_gradient(left, None, right, None, rows) if need_weight else _nothing(weight, x),
    )


@experts.EXPERTS_FORWARD.implement("triton")
def moe_experts(call: experts.ExpertsCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton_sort import sort_rows

    hidden, indices, weights, gate_up, down, keep, lora = *call[:5], call.keep, call.lora
    offsets, permutation, inverse = sort_rows(indices.view(-1), down.shape[0], torch.int32)
    rows = Rows(offsets, indices.numel(), hidden.dtype, batch_invariant=call.batch_invariant)
    tokens = permutation // indices.shape[1]
    pre_activation = hidden.new_empty(rows.count if keep else 0, gate_up.shape[1])
    activated = hidden.new_empty(rows.count, down.shape[2])
    low = _low_rank("rows", hidden, tokens, lora.up_a, lora.up_b, lora.scale, rows)
    up_into(pre_activation if keep else None, activated, hidden, tokens, gate_up, _gating(call), rows, low)
    if keep:
        clear_rest(pre_activation, rows)
    low = _low_rank("rows", activated, None, lora.down_a, lora.down_b, lora.scale, rows)
    products = multiply("rows", activated, down, rows, low=low)
    out = combine(products, inverse, weights, rows, hidden.shape[0])
    return out, pre_activation, offsets, permutation, inverse


@experts.EXPERTS_BACKWARD.implement("triton")
def moe_experts_backward(
    call: experts.ExpertsBackwardCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    hidden, weights, gate_up, down, low = call.hidden, call.weights, call.gate_up, call.down, call.low
    lora = low.lora
    permutation, inverse, pre_activation = call.permutation, call.inverse, call.pre_activation
    rows = Rows(call.offsets, permutation.shape[0], hidden.dtype, batch_invariant=call.batch_invariant)
    tokens = permutation // weights.shape[1]
    low_x = None
    if low.need_up_b or not pre_activation.shape[0]:
        low_x = _low_rank("rows", hidden, tokens, lora.up_a, lora.up_b, lora.scale, rows)
    if not pre_activation.shape[0]:
        pre_activation = hidden.new_empty(rows.count, gate_up.shape[1])
        up_into(pre_activation, None, hidden, tokens, gate_up, _gating(call), rows, low_x)

    d_pre = None
    if call.need_hidden or call.need_gate_up or low.need_up_a or low.need_up_b:
        d_pre = pre_activation.new_empty(pre_activation.shape)
    scaled = None
    if call.need_down or low.need_down_a or low.need_down_b:
        scaled = hidden.new_empty(rows.count, down.shape[2])
    d_weights = weights.new_empty(weights.shape) if call.need_weights else None
    low_grad = None
    if d_pre is not None or d_weights is not None or low.need_down_a:
        low_grad = _low_rank("rows_transposed", call.grad, tokens, lora.down_b, lora.down_a, lora.scale, rows)
    down_backward_into(
        d_pre,
        scaled,
        d_weights,
        call.grad,
        tokens,
        down,
        pre_activation,
        weights,
        permutation,
        inverse,
        _gating(call),
        rows,
        low_grad,
    )
    found = {}
    if scaled is not None:
        if call.need_down:
            found["down"] = weight_gradient(call.grad, tokens, scaled, None, rows)
        if low.need_down_a and low_grad is not None:
            found["down_a"] = weight_gradient(low_grad.rows, None, scaled, None, rows)
        if low.need_down_b and lora.down_a is not None:
            low_scaled = multiply("rows", scaled, lora.down_a, rows, scale=lora.scale)
            found["down_b"] = weight_gradient(call.grad, tokens, low_scaled, None, rows)
    del scaled
    if d_pre is not None:
        if call.need_gate_up:
            found["gate_up"] = weight_gradient(d_pre, None, hidden, tokens, rows)
        if low.need_up_b and low_x is not None:
            found["up_b"] = weight_gradient(d_pre, None, low_x.rows, None, rows)
        low_pre = None
        if call.need_hidden or low.need_up_a:
            low_pre = _low_rank("rows_transposed", d_pre, None, lora.up_b, lora.up_a, lora.scale, rows)
        if low.need_up_a and low_pre is not None:
            found["up_a"] = weight_gradient(low_pre.rows, None, hidden, tokens, rows)
        if call.need_hidden:
            d_rows = multiply("rows_transposed", d_pre, gate_up, rows, low=low_pre)
            found["hidden"] = combine(d_rows, inverse, None, rows, hidden.shape[0])
    if d_weights is not None:
        found["weights"] = d_weights

    def gradient(name: str, leaf: Tensor | None) -> Tensor:
        return found[name] if name in found else _nothing(leaf, hidden)

    names = lora._fields[:4] if lora.is_there() else ()
    return (
        gradient("hidden", hidden),
        gradient("weights", weights),
        gradient("gate_up", gate_up),
        gradient("down", down),
        [gradient(name, matrix) for name, matrix in zip(names, lora[:4], strict=False)],
    )


def _low_rank(
    kernel: str,
    x: Tensor,
    gather: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    scale: float,
    rows: Rows,
) -> LowRank | None:
    """x[gather] times ``first``, for a product to which ``second`` times that is added; None without these matrices."""
    if first is None or second is None:
        return None
    return LowRank(multiply(kernel, x, first, rows, gather, scale=scale), second)


def _gating(call: experts.ExpertsCall | experts.ExpertsBackwardCall) -> dict[str, int | float]:
    return {"ACTIVATION": call.activation, "ALPHA": call.alpha, "LIMIT": call.limit, "SHIFT": call.shift}


def _nothing(leaf: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if leaf is None else leaf.new_empty(0, *leaf.shape[1:])
