"""route: which experts a token goes to, and with what weights.

T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..op import Contiguous, Float32, Kernel, Op, recorded
from . import reference
from .reference import SCORES

GROUP_SCORES = ("best", "two_best")
CHOICES = ("scores", "logits")
MOST_EXPERTS = 2048  # whose scores a GPU holds in registers


class Routing(NamedTuple):
    """What ``route`` returns.

    weights: (T, K) float32 (float64 for float64 logits), with the gradient of the logits.
    indices: (T, K) int64.
    tokens_per_expert: (E,) int32, how many of the T * K choices fell on each expert.
    """

    weights: Tensor
    indices: Tensor
    tokens_per_expert: Tensor


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "sigmoid",
    bias: Tensor | None = None,
    choose_by: str = "scores",
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str | None = None,
    normalize: bool = True,
    eps: float = 1e-20,
    scale: float = 1.0,
    indices: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    r"""Choose ``top_k`` experts for each token and weigh them.

    With scores p = sigmoid(logits), softmax(logits) or sqrt(softplus(logits)), and selection scores s = p + bias or
    logits + bias (``choose_by``):

    1. groups (``n_group`` > 1): the experts form ``n_group`` groups of equal size in order; the score of a group is the
       sum of its two best s (DeepSeek-V3) or its best s (DeepSeek-V2); only the experts of the ``topk_group`` best groups
       stay eligible;
    2. choice: the ``top_k`` eligible experts with the largest s, in descending order of s;
    3. weights, from the unbiased p of the chosen: p_j, or p_j / (sum_i p_i + eps) if ``normalize`` (for "softmax" that is
       the softmax over the chosen logits, without eps), times ``scale``.

    Among equal selection scores, and equal group scores, the lowest index wins.

    NaN and infinite logits give what these formulas give, live and in replay. A softmax has no scores if any logit of the
    token is NaN or +inf, or all are -inf: all its weights are NaN, with ``normalize`` too, whichever experts are chosen. The
    other scores are NaN for a NaN logit alone: that expert is chosen first, and with ``normalize`` all weights of a token that
    chose it are NaN. A logit of -inf has the score 0. Such a token changes no other.

    Args:
        logits: (T, E), float32, bfloat16, float16 or float64, any strides.
        top_k: K, at least 1 and at most the number of eligible experts, ``topk_group * E / n_group``.
        score: "sigmoid", "softmax" or "sqrt_softplus" (DeepSeek-V4).
        bias: (E,), the selection bias of aux-loss-free balancing (see ``update_router_bias``); it changes the choice, not
            the weights, and gets no gradient.
        choose_by: "scores", or "logits" to add the bias to the logits and choose by the sum.
        n_group, topk_group: the number of expert groups (a divisor of E) and how many of them a token may use.
        group_score: "best" or "two_best", of which selection scores a group's is the sum; None: "best" for "softmax", else
            "two_best".
        normalize: whether the weights of a token sum to ``scale``.
        eps: what ``normalize`` adds to the sum, at least 0.
        scale: a factor on the weights (2.5 in DeepSeek-V3).
        indices: (T, K) int64, a recorded choice to replay: no selection takes place, the weights are computed live from
            the logits at these experts. An expert may occur more than once in a row.
        backend: "cuda", "triton", "cpu" or "reference": that one or an error; None chooses (see r1kernels.backends).

    Returns:
        Routing(weights, indices, tokens_per_expert).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or size.
        IndexError: a replayed index outside [0, E) (on the CPU; on CUDA it gets weight 0 and no count unless
            ``debug_checks(True)``).

    Precision: float32 throughout, whatever the dtype of the logits and under autocast too. Gradients come in the dtype
    of the logits; that of a token with NaN weights is NaN at its chosen experts once the gradient of the weights is.
    Deterministic, and independent of the other rows.

    Source: DeepSeek-V3 (arXiv 2412.19437), DeepSeek-V2 (2405.04434), Mixtral, Qwen3-MoE, OLMoE; "sqrt_softplus",
    ``choose_by`` and other ``eps`` from the routers of DeepSeek-V4, Kolibri and LFM2 in transformers.
    """
    checks.tensor("logits", logits, dtypes=checks.FLOATS, ndim=2)
    tokens, experts = logits.shape
    if experts == 0:
        raise ValueError(f"logits: expected at least one expert, got shape {tuple(logits.shape)}")
    top_k = checks.integer("top_k", top_k, minimum=1)
    checks.choice("score", score, SCORES)
    if bias is not None:
        checks.tensor("bias", bias, dtypes=checks.FLOATS, shape=(experts,), like=logits)
    checks.choice("choose_by", choose_by, CHOICES)
    n_group = checks.integer("n_group", n_group, minimum=1)
    topk_group = checks.integer("topk_group", topk_group, minimum=1)
    if experts % n_group:
        raise ValueError(f"n_group: expected a divisor of the number of experts {experts}, got {n_group}")
    if topk_group > n_group:
        raise ValueError(f"topk_group: expected at most n_group = {n_group}, got {topk_group}")
    if group_score is None:
        group_score = "best" if score == "softmax" else "two_best"
    else:
        checks.choice("group_score", group_score, GROUP_SCORES)
    checks.boolean("normalize", normalize)
    eps = checks.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    scale = checks.number("scale", scale)
    if indices is None:
        eligible = topk_group * (experts // n_group)
        if top_k > eligible:
            raise ValueError(f"top_k: expected at most the {eligible} eligible experts, got {top_k}")
    else:
        checks.tensor("indices", indices, dtypes=(torch.int64,), shape=(tokens, top_k), like=logits)
        if checks.values_visible(indices):
            checks.in_range("indices", indices, 0, experts)
    choice = BY_SCORES
    by_logits = choose_by == "logits"
    if by_logits or n_group > 1 or bias is not None or indices is not None:
        choice = Choice(by_logits, bias, n_group, topk_group, group_score == "two_best", indices)
    weighing = (SCORES.index(score), normalize, float(eps), float(scale))
    return Routing(*ROUTE(backend, RouteCall(logits, top_k, *weighing, choice)))


class Choice(NamedTuple):
    by_logits: bool = False
    bias: Float32 | None = None
    n_group: int = 1
    topk_group: int = 1
    two_best: bool = False
    indices: Contiguous | None = None  # a choice to replay, which is copied to the result; None: choose


BY_SCORES = Choice()


class RouteCall(NamedTuple):
    logits: Contiguous
    top_k: int
    score: int  # the place in SCORES
    normalize: bool
    eps: float
    scale: float
    choice: Choice = BY_SCORES


class RouteBackwardCall(NamedTuple):
    grad_weights: Contiguous  # (T, K) float32
    logits: Contiguous
    indices: Tensor
    score: int
    normalize: bool
    eps: float
    scale: float


def _shapes(call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = call.logits.shape
    return (
        call.logits.new_empty((tokens, call.top_k), dtype=torch.float32),
        call.logits.new_empty((tokens, call.top_k), dtype=torch.int64),
        call.logits.new_empty(experts, dtype=torch.int32),
    )


def _backward_shapes(call: RouteBackwardCall) -> Tensor:
    return torch.empty_like(call.logits)


FORWARD = Kernel("route", RouteCall, _shapes)
BACKWARD = Kernel("route", RouteBackwardCall, _backward_shapes, suffix="_backward")


def _save(call: RouteCall, results: tuple[Tensor, ...]) -> Any:
    return (results[1],), (call.score, call.normalize, call.eps, call.scale)


def _gradients(backend: str, inputs: Any, tensors: Any, others: Any, grads: Any, needs: Any) -> list[Tensor]:
    return [BACKWARD(backend, RouteBackwardCall(grads[0], *inputs, *tensors, *others))]


_recorded = recorded(
    "route",
    FORWARD,
    differentiable=lambda call: (call.logits,),
    save=_save,
    backward=_gradients,
    constant=(1, 2),
)


def _limits(backend: str, call: RouteCall) -> tuple[str, ...]:
    if backend == "cpu" or (experts := call.logits.shape[1]) <= MOST_EXPERTS:
        return ()
    return (f"{experts} experts are more than the {MOST_EXPERTS} that a GPU kernel chooses from",)


ROUTE = Op("route", reference.route, _recorded, decides="logits", limits=_limits)
