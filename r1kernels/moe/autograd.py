"""One autograd function an op around the kernel backends of the MoE family (the reference is differentiated by autograd).

They stand outside the torch ops of ``ops.py`` and are entered only where a gradient is needed. Arguments are those of the
public functions, checked; what the ops want contiguous, or in float32, is made so here. Hidden states and weight matrices are
saved as they are, so that a contiguous copy does not live until the backward.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import ops
from .experts import ACTIVATIONS
from .routing import Routing
from .sort import ExpertOrder


def sort_by_expert(backend: str, indices: Tensor, num_experts: int) -> ExpertOrder:
    return ExpertOrder(*_op("sort_by_expert", backend)(indices.reshape(-1).contiguous(), num_experts))


def route(
    backend: str,
    logits: Tensor,
    top_k: int,
    score: str,
    bias: Tensor | None,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
    indices: Tensor | None,
) -> Routing:
    bias = None if bias is None else bias.detach().float().contiguous()
    indices = None if indices is None else indices.contiguous()
    arguments = (top_k, score == "softmax", bias, n_group, topk_group, normalize, scale, indices)
    logits = logits.contiguous()
    if _needs_gradient(logits):
        return Routing(*Route.apply(backend, logits, *arguments))
    return Routing(*_op("route", backend)(logits, *arguments))


class Route(torch.autograd.Function):
    """(backend, logits, ...) -> (weights, indices, tokens per expert); saves the logits and the choice."""

    @staticmethod
    def forward(ctx: Any, backend: str, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        weights, indices, counts = _op("route", backend)(logits, *arguments)
        ctx.save_for_backward(logits, indices)
        _, softmax, _, _, _, normalize, scale, _ = arguments
        ctx.backend, ctx.options = backend, (softmax, normalize, scale)
        ctx.mark_non_differentiable(indices, counts)
        return weights, indices, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, indices = ctx.saved_tensors
        with torch.no_grad():
            grad = _backward_op("route", ctx.backend)(grads[0].contiguous(), logits, indices, *ctx.options)
        return None, checks.first_derivative_only("route", grad, logits), *(None,) * 8


def grouped_gemm(backend: str, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    offsets = offsets.to(torch.int32).contiguous()
    if _needs_gradient(x, weight):
        return GroupedGemm.apply(backend, x, weight, offsets)
    return _op("grouped_gemm", backend)(x.contiguous(), weight.contiguous(), offsets)


class GroupedGemm(torch.autograd.Function):
    """(backend, x, weight, offsets) -> y; saves its arguments."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.backend = backend
        return _op("grouped_gemm", backend)(x.contiguous(), weight.contiguous(), offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:3]
        with torch.no_grad():
            results = _backward_op("grouped_gemm", ctx.backend)(
                grads[0].contiguous(), x.contiguous(), weight.contiguous(), offsets, *needed
            )
        return None, *_first_only("grouped_gemm", results, needed, (x, weight)), None


def moe_experts(
    backend: str,
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    save: str,
) -> Tensor:
    arguments = hidden, indices, weights.float(), gate_up, down
    if _needs_gradient(hidden, weights, gate_up, down):
        return MoeExperts.apply(backend, *arguments, ACTIVATIONS.index(activation), save == "hidden")
    return _op("moe_experts", backend)(*_contiguous(*arguments), ACTIVATIONS.index(activation), False)[0]


class MoeExperts(torch.autograd.Function):
    """(backend, hidden, indices, weights, gate_up, down, activation, keep) -> out.

    Saves the arguments, the order of the rows and, with ``keep``, the pre-activation (S, 2 * I): nothing of size (S, H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        activation: int,
        keep: bool,
    ) -> Tensor:
        arguments = _contiguous(hidden, indices, weights, gate_up, down)
        out, *saved = _op("moe_experts", backend)(*arguments, activation, keep)
        ctx.save_for_backward(hidden, weights, gate_up, down, *saved)
        ctx.backend, ctx.activation = backend, activation
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        _, need_hidden, _, *need_others, _, _ = ctx.needs_input_grad
        needed = (need_hidden, *need_others)
        with torch.no_grad():
            results = _backward_op("moe_experts", ctx.backend)(
                *_contiguous(*grads, *saved), ctx.activation, *needed
            )
        d_hidden, *others = _first_only("moe_experts", results, needed, saved[:4])
        return None, d_hidden, None, *others, None, None


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _op(op: str, backend: str) -> Any:
    return getattr(ops.namespace, f"{op}_{backend}")


def _backward_op(op: str, backend: str) -> Any:
    return getattr(ops.namespace, f"{op}_{backend}_backward")


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _first_only(
    op: str, grads: tuple[Tensor, ...], needed: tuple[bool, ...], inputs: tuple[Tensor, ...]
) -> list[Tensor | None]:
    return [
        checks.first_derivative_only(op, grad, *inputs) if need else None
        for grad, need in zip(grads, needed, strict=True)
    ]
