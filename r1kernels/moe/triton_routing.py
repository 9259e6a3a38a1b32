"""The Triton backend of the router and of sort_by_expert: its ops.

Triton is imported at the first launch, never before. T tokens, E experts, K experts per token, S rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import routing, sort
from .reference import SCORES

EXPERTS_OF_WARP = 512
SIGMOID, SOFTMAX = (SCORES.index(score) for score in ("sigmoid", "softmax"))
FEWEST_CANDIDATES = 8


@sort.FORWARD.implement("triton")
def sort_by_expert(call: sort.SortCall) -> tuple[Tensor, Tensor, Tensor]:
    """In one launch for few rows, else in three."""
    from . import triton_sort

    return triton_sort.sort_rows(call.indices, call.experts, torch.int64)


@routing.FORWARD.implement("triton")
def route(call: routing.RouteCall) -> tuple[Tensor, Tensor, Tensor]:
    """In one launch."""
    from . import triton_route

    logits, top_k, score, normalize, eps, scale, choice = call
    by_logits, bias, n_group, topk_group, two_best, indices = choice
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    chosen = logits.new_empty((tokens, top_k), dtype=torch.int64)
    counts = logits.new_zeros(experts, dtype=torch.int32)
    if indices is not None:
        n_group = topk_group = 1
    groups, members = _power_of_two(n_group), _power_of_two(experts // n_group)
    if tokens > 0:
        with torch.cuda.device_of(logits):
            triton_route.route_kernel[(tokens,)](
                logits,
                bias,
                indices,
                weights,
                chosen,
                counts,
                experts,
                top_k,
                n_group,
                topk_group,
                eps,
                scale,
                SCORE=score,
                BY_LOGITS=by_logits,
                TWO_BEST=two_best,
                NORMALIZE=normalize,
                GROUPS=groups,
                MEMBERS=members,
                SLOTS=_power_of_two(top_k),
                CANDIDATES=_candidates(call, groups * members),
                **_launch(groups * members),
            )
    return weights, chosen, counts


@routing.BACKWARD.implement("triton")
def route_backward(call: routing.RouteBackwardCall) -> Tensor:
    """In one launch."""
    from . import triton_route

    grad_weights, logits, indices, score, normalize, eps, scale = call
    (tokens, experts), top_k = logits.shape, indices.shape[1]
    grad = torch.empty_like(logits)
    size = _power_of_two(experts)
    if tokens > 0:
        with torch.cuda.device_of(logits):
            triton_route.route_backward_kernel[(tokens,)](
                grad_weights,
                logits,
                indices,
                grad,
                experts,
                top_k,
                eps,
                scale,
                SCORE=score,
                NORMALIZE=normalize,
                EXPERTS=size,
                SLOTS=_power_of_two(top_k),
                **_launch(size),
            )
    return grad


def _candidates(call: routing.RouteCall, size: int) -> int:
    """How many experts float32 may leave for the choice; 0 where it cannot stand for what experts are chosen by."""
    choice, most = call.choice, max(2 * _power_of_two(call.top_k), FEWEST_CANDIDATES)
    of_logits = choice.bias is None and (choice.n_group == 1 or not choice.two_best)
    by_values = call.score == SIGMOID or (call.score == SOFTMAX and of_logits)
    return most if by_values and not choice.by_logits and choice.indices is None and most <= size else 0


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _launch(size: int) -> dict[str, int | bool]:
    """Options of a launch whose programs hold ``size`` experts."""
    return {"num_warps": min(max(size // EXPERTS_OF_WARP, 1), 16), "enable_fp_fusion": True}
