"""The loss term of each variant, one value per token, to be minimised.

x: log-prob under the policy, o: under the policy that made the sample, l = x - o, c: importance ratio (of the token, or
of its sequence), A: advantage. Every function returns l_t; the line above a formula gives its derivative in x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout
from .objective import Objective

LOWEST_LOG_WEIGHT = math.log(1e-8)
HIGHEST_LOG_WEIGHT = 20.0


class Inputs(NamedTuple):
    """What the terms are made of; all values are one per token and finite where a token does not count."""

    layout: Layout
    logp: Tensor
    """x; with ratio="output", the sum of x over the output."""
    log_ratio: Tensor
    """l = x - o of the token."""
    ratio: Tensor
    """c."""
    advantages: Tensor
    """A."""
    policy_weights: Tensor | None
    """As given: one per token, or (B, 1)."""


def policy_term(inputs: Inputs, objective: Objective) -> Tensor:
    """l_t of ``objective.variant``, times the policy weights (which VESPO has inside its own weight)."""
    term = TERMS[objective.variant](inputs, objective)
    if inputs.policy_weights is None or objective.variant == "vespo":
        return term
    return term * inputs.layout.keep(inputs.layout.to_tokens(inputs.policy_weights))


def grpo(inputs: Inputs, objective: Objective) -> Tensor:
    """PPO's clip: -min(min(c, delta) A, clip(c, 1 - low, 1 + high) A); delta bounds the unclipped branch alone."""
    return -_lesser_branch(inputs, objective)


def dual_clip(inputs: Inputs, objective: Objective) -> Tensor:
    """As ``grpo``; for A < 0 the term is at most -bound A."""
    term = -_lesser_branch(inputs, objective)
    bound = -objective.dual_bound * inputs.advantages
    return torch.where((inputs.advantages < 0) & (term > bound), bound, term)


def cispo(inputs: Inputs, objective: Objective) -> Tensor:
    """REINFORCE weighted by the ratio, bounded from above and held constant: -sg(min(c, high)) A x."""
    # dx: -min(c, high) A
    return (
        -inputs.ratio.clamp(max=_scalar(objective.clip_high, inputs.ratio)).detach()
        * inputs.advantages
        * inputs.logp
    )


def sapo(inputs: Inputs, objective: Objective) -> Tensor:
    """A sigmoid gate in place of the clip: -A sigma(tau (c - 1)) 4 / tau, tau by the sign of A."""
    for_gain, for_loss = objective.tau
    tau = _by_sign(inputs.advantages > 0, for_gain, for_loss, like=inputs.ratio)
    # dx: -A 4 sigma (1 - sigma) dc/dx
    return -inputs.advantages * torch.sigmoid(tau * (inputs.ratio - 1)) * 4 / tau


def vespo(inputs: Inputs, objective: Objective) -> Tensor:
    """REINFORCE weighted by phi of the whole sequence: -sg(phi) A x, log phi = lam + k log w - lam w."""
    layout = inputs.layout
    (k_up, lam_up), (k_down, lam_down) = objective.vespo
    log_weight = layout.total(inputs.log_ratio.detach().clamp(-HIGHEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT))
    if inputs.policy_weights is not None:
        log_weight = log_weight + _log_policy_weight(layout, inputs.policy_weights)
    log_weight = layout.spread(log_weight.clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT))
    rewarded = inputs.advantages >= 0
    k = _by_sign(rewarded, k_up, k_down, like=log_weight)
    lam = _by_sign(rewarded, lam_up, lam_down, like=log_weight)
    phi = torch.exp(lam + k * log_weight - lam * log_weight.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    # dx: -phi A
    return -phi * inputs.advantages * inputs.logp


def gmpo(inputs: Inputs, objective: Objective) -> Tensor:
    """The geometric mean of clipped ratios: -A G, G = exp(mean_t sgn(A) min(sgn(A) l, sgn(A) clamp(l, -low, high)))."""
    layout = inputs.layout
    sign = inputs.advantages.sign()
    low, high = _scalar(-objective.clip_low, inputs.log_ratio), _scalar(objective.clip_high, inputs.log_ratio)
    clipped = inputs.log_ratio.clamp(low, high)
    bounded = sign * torch.minimum(sign * inputs.log_ratio, sign * clipped)
    # dG/dx_u: G a_u / sum m, with a_u = [l <= high] for A > 0 and [l >= -low] for A < 0
    mean = layout.total(bounded) / layout.lengths(bounded.dtype).clamp(min=1)
    return -inputs.advantages * layout.spread(mean.exp())


def reinforce(inputs: Inputs, objective: Objective) -> Tensor:
    """The plain policy gradient: -A x."""
    return -inputs.advantages * inputs.logp


TERMS: dict[str, Callable[[Inputs, Objective], Tensor]] = {
    "grpo": grpo,
    "dual_clip": dual_clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    "gmpo": gmpo,
    "reinforce": reinforce,
}


def clipped_tokens(inputs: Inputs, objective: Objective) -> tuple[Tensor, Tensor]:
    """Which tokens a clip bounds (bool, one per token): from below, and from above."""
    punished, rewarded = inputs.advantages < 0, inputs.advantages > 0
    if objective.variant in ("grpo", "dual_clip"):
        low, high = inputs.ratio < 1 - objective.clip_low, inputs.ratio > 1 + objective.clip_high
    elif objective.variant == "gmpo":
        low, high = inputs.log_ratio < -objective.clip_low, inputs.log_ratio > objective.clip_high
    elif objective.variant == "cispo":
        high = inputs.ratio > objective.clip_high
        low = torch.zeros_like(high)
    else:
        low = high = torch.zeros_like(punished)
    return low & punished, high & rewarded


def _lesser_branch(inputs: Inputs, objective: Objective) -> Tensor:
    """min(min(c, delta) A, clip(c) A)."""
    ratio = (
        inputs.ratio
        if objective.delta is None
        else inputs.ratio.clamp(max=_scalar(objective.delta, inputs.ratio))
    )
    # an infinite ratio without advantage is nothing, not NaN
    unclipped = torch.where(inputs.advantages == 0, 0.0, ratio * inputs.advantages)
    low, high = _scalar(1 - objective.clip_low, inputs.ratio), _scalar(1 + objective.clip_high, inputs.ratio)
    clipped = inputs.ratio.clamp(low, high) * inputs.advantages
    # dx: A dc/dx where the unclipped branch is the lesser one and c <= delta, else 0
    return torch.minimum(unclipped, clipped)


def _log_policy_weight(layout: Layout, weights: Tensor) -> Tensor:
    """(B,): the bounded log of a sequence's weight, or the sum over those of its tokens."""
    if weights.shape == (layout.num_sequences, 1):
        return weights.squeeze(1).log().clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
    return layout.total(weights.log().clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT))


def _by_sign(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """``yes`` or ``no`` for each token, in the dtype of ``like``."""
    return torch.where(condition, _scalar(yes, like), _scalar(no, like))


def _scalar(number: float, like: Tensor) -> Tensor:
    """A 0-d tensor of a number; by a product, through which torch.compile carries a number that changes."""
    return like.new_ones(()) * number
