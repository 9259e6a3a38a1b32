"""The Triton backend of the experts: grouped_gemm and moe_experts, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from . import experts
from .triton_products import (
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
    x, weight, offsets, batch_invariant = call
    bounds = ascending(offsets, x.shape[0])
    rows = Rows(bounds, x.shape[0], x.dtype, tail=True, batch_invariant=batch_invariant)
    return multiply("rows", x, weight, rows)


@experts.GEMM_BACKWARD.implement("triton")
def grouped_gemm_backward(call: experts.GemmBackwardCall) -> tuple[Tensor, Tensor]:
    grad, x, weight, offsets, need_x, need_weight = call
    rows = Rows(ascending(offsets, x.shape[0]), x.shape[0], x.dtype, tail=True)
    return (
        multiply("rows_transposed", grad, weight, rows) if need_x else _nothing(x),
        weight_gradient(grad, None, x, None, rows) if need_weight else _nothing(weight),
    )


@experts.EXPERTS_FORWARD.implement("triton")
def moe_experts(call: experts.ExpertsCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton_sort import sort_rows

    hidden, indices, weights, gate_up, down, keep = *call[:5], call.keep
    offsets, permutation, inverse = sort_rows(indices.view(-1), down.shape[0], torch.int32)
    rows = Rows(offsets, indices.numel(), hidden.dtype, batch_invariant=call.batch_invariant)
    tokens = permutation // indices.shape[1]
    pre_activation = hidden.new_empty(rows.count if keep else 0, gate_up.shape[1])
    activated = hidden.new_empty(rows.count, down.shape[2])
    up_into(pre_activation if keep else None, activated, hidden, tokens, gate_up, _gating(call), rows)
    if keep:
        clear_rest(pre_activation, rows)
    out = combine(multiply("rows", activated, down, rows), inverse, weights, rows, hidden.shape[0])
    return out, pre_activation, offsets, permutation, inverse


@experts.EXPERTS_BACKWARD.implement("triton")
def moe_experts_backward(call: experts.ExpertsBackwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weights, gate_up, down = call.hidden, call.weights, call.gate_up, call.down
    permutation, inverse, pre_activation = call.permutation, call.inverse, call.pre_activation
    rows = Rows(call.offsets, permutation.shape[0], hidden.dtype, batch_invariant=call.batch_invariant)
    tokens = permutation // weights.shape[1]
    if not pre_activation.shape[0]:
        pre_activation = hidden.new_empty(rows.count, gate_up.shape[1])
        up_into(pre_activation, None, hidden, tokens, gate_up, _gating(call), rows)

    d_pre = None
    if call.need_hidden or call.need_gate_up:
        d_pre = pre_activation.new_empty(pre_activation.shape)
    scaled = hidden.new_empty(rows.count, down.shape[2]) if call.need_down else None
    d_weights = weights.new_empty(weights.shape) if call.need_weights else None
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
    )
    d_down = _nothing(down) if scaled is None else weight_gradient(call.grad, tokens, scaled, None, rows)
    del scaled
    d_hidden, d_gate_up = _nothing(hidden), _nothing(gate_up)
    if d_pre is not None and call.need_gate_up:
        d_gate_up = weight_gradient(d_pre, None, hidden, tokens, rows)
    if d_pre is not None and call.need_hidden:
        d_rows = multiply("rows_transposed", d_pre, gate_up, rows)
        d_hidden = combine(d_rows, inverse, None, rows, hidden.shape[0])
    return d_hidden, _nothing(weights) if d_weights is None else d_weights, d_gate_up, d_down


def _gating(call: experts.ExpertsCall | experts.ExpertsBackwardCall) -> dict[str, int | float]:
    return {"ACTIVATION": call.activation, "ALPHA": call.alpha, "LIMIT": call.limit, "SHIFT": call.shift}


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, *like.shape[1:])
