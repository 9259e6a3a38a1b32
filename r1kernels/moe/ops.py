"""The torch ops of the MoE family: schemas and fakes, for the backends cpu, cuda and triton.

They exist without the extension; it (cpu, cuda) and triton.py add the implementations. Called from autograd.py.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows, N inputs and M outputs
of a GEMM. "Expert order": the rows sorted by expert as sort_by_expert does it, sentinels last. All tensors are
contiguous; a gradient that is not needed has size 0 at its first dimension. <b> is the backend.

    sort_by_expert_<b>(indices, experts) -> (offsets, permutation, inverse)
        indices (S,) int64 -> (E + 1,) int32, (S,) int64, (S,) int64
    grouped_gemm_<b>(x, weight, offsets) -> y
        x (S, N), weight (E, M, N), offsets (E + 1,) int32 -> (S, M)
    grouped_gemm_<b>_backward(grad, x, weight, offsets, need_x, need_weight) -> (grad_x, grad_weight)
    route_<b>(logits, top_k, softmax, bias, n_group, topk_group, normalize, scale, indices) -> (weights, indices, counts)
        logits (T, E), bias (E,) float32 or None, indices (T, K) int64 or None: choose
        weights (T, K) float32, indices (T, K) int64 (a copy where they are given), counts (E,) int32
    route_<b>_backward(grad_weights, logits, indices, softmax, normalize, scale) -> grad_logits
        grad_weights (T, K) float32 -> (T, E) in the dtype of the logits
    moe_experts_<b>(hidden, indices, weights, gate_up, down, activation, keep)
            -> (out, pre_activation, offsets, permutation, inverse)
        hidden (T, H), indices (T, K) int64, weights (T, K) float32, gate_up (E, 2 * I, H), down (E, H, I)
        activation     the position in experts.ACTIVATIONS
        out            (T, H)
        pre_activation (S, 2 * I) in expert order if ``keep``, else (0, 2 * I)
        offsets (E + 1,) int32, permutation (S,) int32, inverse (S,) int32: the order of the rows
    moe_experts_<b>_backward(grad, hidden, weights, gate_up, down, pre_activation, offsets, permutation, inverse,
                             activation, need_hidden, need_weights, need_gate_up, need_down)
            -> (grad_hidden, grad_weights, grad_gate_up, grad_down)
        pre_activation of no rows is computed again

An index outside [0, E) (in moe_experts and sort_by_expert: [0, E]), or offsets that do not ascend from 0 to at most S: a
RuntimeError from the cpu ops; on a GPU nothing is read or written out of bounds, such an index counts as a sentinel and
has weight 0, and offsets of grouped_gemm count as max(offsets[: e + 1]), cut to [0, S]; rows that no expert has are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cpu", "cuda", "triton")

library = torch.library.Library("r1kernels", "FRAGMENT")

_ORDER = "Tensor offsets, Tensor permutation, Tensor inverse"
_NEEDS = "bool need_hidden, bool need_weights, bool need_gate_up, bool need_down"


def _sort(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = indices.new_empty(experts + 1, dtype=torch.int32)
    return offsets, torch.empty_like(indices), torch.empty_like(indices)


def _gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _gemm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return _gradient(x, need_x), _gradient(weight, need_weight)


def _route(
    logits: Tensor,
    top_k: int,
    softmax: bool,
    bias: Tensor | None,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
    indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    return (
        logits.new_empty((tokens, top_k), dtype=torch.float32),
        logits.new_empty((tokens, top_k), dtype=torch.int64),
        logits.new_empty(experts, dtype=torch.int32),
    )


def _route_backward(grad_weights: Tensor, logits: Tensor, *unused: object) -> Tensor:
    return torch.empty_like(logits)


def _experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = indices.numel()
    return (
        torch.empty_like(hidden),
        hidden.new_empty(rows if keep else 0, gate_up.shape[1]),
        indices.new_empty(down.shape[0] + 1, dtype=torch.int32),
        indices.new_empty(rows, dtype=torch.int32),
        indices.new_empty(rows, dtype=torch.int32),
    )


def _experts_backward(
    grad: Tensor,
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    pre_activation: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    activation: int,
    need_hidden: bool,
    need_weights: bool,
    need_gate_up: bool,
    need_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _gradient(hidden, need_hidden),
        _gradient(weights, need_weights),
        _gradient(gate_up, need_gate_up),
        _gradient(down, need_down),
    )


def _gradient(like: Tensor, needed: bool) -> Tensor:
    return like.new_empty((like.shape[0] if needed else 0, *like.shape[1:]))


_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "sort_by_expert_{}": ("(Tensor indices, int experts) -> (Tensor, Tensor, Tensor)", _sort),
    "grouped_gemm_{}": ("(Tensor x, Tensor weight, Tensor offsets) -> Tensor", _gemm),
    "grouped_gemm_{}_backward": (
        "(Tensor grad, Tensor x, Tensor weight, Tensor offsets, bool need_x, bool need_weight) -> (Tensor, Tensor)",
        _gemm_backward,
    ),
    "route_{}": (
        "(Tensor logits, int top_k, bool softmax, Tensor? bias, int n_group, int topk_group, bool normalize, "
        "float scale, Tensor? indices) -> (Tensor, Tensor, Tensor)",
        _route,
    ),
    "route_{}_backward": (
        "(Tensor grad_weights, Tensor logits, Tensor indices, bool softmax, bool normalize, float scale) -> Tensor",
        _route_backward,
    ),
    "moe_experts_{}": (
        "(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, int activation, bool keep) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _experts,
    ),
    "moe_experts_{}_backward": (
        f"(Tensor grad, Tensor hidden, Tensor weights, Tensor gate_up, Tensor down, Tensor pre_activation, {_ORDER}, "
        f"int activation, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
        _experts_backward,
    ),
}

for _pattern, (_schema, _fake) in _SCHEMAS.items():
    for _backend in BACKENDS:
        _name = _pattern.format(_backend)
        library.define(_name + _schema)
        torch.library.register_fake(f"r1kernels::{_name}", _fake, lib=library)

namespace = torch.ops.r1kernels
