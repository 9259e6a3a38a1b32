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

SCORES = ("sigmoid", "softmax")
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
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    indices: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    r"""Choose ``top_k`` experts for each token and weigh them.

    With scores p = sigmoid(logits) or softmax(logits), and selection scores s = p + bias:

    1. groups (``n_group`` > 1): the experts form ``n_group`` groups of equal size in order; the score of a group is the
       sum of its two best s for "sigmoid" (DeepSeek-V3), its best s for "softmax" (DeepSeek-V2); only the experts
       of the ``topk_group`` best groups stay eligible;
    2. choice: the ``top_k`` eligible experts with the largest s, in descending order of s;
    3. weights, from the unbiased p of the chosen: p_j, or p_j / (sum_i p_i + 1e-20) if ``normalize`` (for "softmax" that
       is the softmax over the chosen logits), times ``scale``.

    Among equal selection scores, and equal group scores, the lowest index wins.

    NaN and infinite logits give what these formulas give, live and in replay. A softmax has no scores if any logit of the
    token is NaN or +inf, or all are -inf: all its weights are NaN, with ``normalize`` too, whichever experts are chosen. A
    sigmoid is NaN for a NaN logit alone: that expert is chosen first, and with ``normalize`` all weights of a token that
    chose it are NaN. A logit of -inf has the score 0. Such a token changes no other.

    Args:
        logits: (T, E), float32, bfloat16, float16 or float64, any strides.
        top_k: K, at least 1 and at most the number of eligible experts, ``topk_group * E / n_group``.
        score: "sigmoid" or "softmax".
        bias: (E,), the selection bias of aux-loss-free balancing (see ``update_router_bias``); it changes the choice, not
            the weights, and gets no gradient.
        n_group, topk_group: the number of expert groups (a divisor of E) and how many of them a token may use.
        normalize: whether the weights of a token sum to ``scale``.
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

    Source: DeepSeek-V3 (arXiv 2412.19437), DeepSeek-V2 (2405.04434), Mixtral, Qwen3-MoE, OLMoE.
    """
    checks.tensor("logits", logits, dtypes=checks.FLOATS, ndim=2)
    tokens, experts = logits.shape
    if experts == 0:
        raise ValueError(f"logits: expected at least one expert, got shape {tuple(logits.shape)}")
    top_k = checks.integer("top_k", top_k, minimum=1)
    checks.choice("score", score, SCORES)
    if bias is not None:
        checks.tensor("bias", bias, dtypes=checks.FLOATS, shape=(experts,), like=logits)
    n_group = checks.integer("n_group", n_group, minimum=1)
    topk_group = checks.integer("topk_group", topk_group, minimum=1)
    if experts % n_group:
        raise ValueError(f"n_group: expected a divisor of the number of experts {experts}, got {n_group}")
    if topk_group > n_group:
        raise ValueError(f"topk_group: expected at most n_group = {n_group}, got {topk_group}")
    checks.boolean("normalize", normalize)
    scale = checks.number("scale", scale)
    if indices is None:
        eligible = topk_group * (experts // n_group)
        if top_k > eligible:
            raise ValueError(f"top_k: expected at most the {eligible} eligible experts, got {top_k}")
    else:
        checks.tensor("indices", indices, dtypes=(torch.int64,), shape=(tokens, top_k), like=logits)
        if checks.values_visible(indices):
            checks.in_range("indices", indices, 0, experts)
    call = RouteCall(
        logits, top_k, score == "softmax", bias, n_group, topk_group, normalize, float(scale), indices
    )
    return Routing(*ROUTE(backend, call))


class RouteCall(NamedTuple):
    logits: Contiguous
    top_k: int
    softmax: bool
    bias: Float32 | None
    n_group: int
    topk_group: int
    normalize: bool
    scale: float
    indices: Contiguous | None  # a choice to replay, which is copied to the result; None: choose


class RouteBackwardCall(NamedTuple):
    grad_weights: Contiguous  # (T, K) float32
    logits: Contiguous
    indices: Tensor
    softmax: bool
    normalize: bool
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
    return (results[1],), (call.softmax, call.normalize, call.scale)


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
    experts = call.logits.shape[1]
    if backend == "cpu" or experts <= MOST_EXPERTS:
        return ()
    return (f"{experts} experts are more than the {MOST_EXPERTS} that a GPU kernel chooses from",)


ROUTE = Op("route", reference.route, _recorded, decides="logits", limits=_limits)
