"""The reference backend of the GRPO ops: plain PyTorch, traced by autograd and torch.compile; the oracle of the kernels.

B sequences, T or N tokens (padded or packed).

NaN and inf in places that do not count are replaced where they enter (``Layout.keep``), so that they reach neither a
value nor a gradient; where a term leaves, the mask is applied again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kl import kl_estimate
from .layout import Layout, layout_of
from .metrics import GRPOOutput, Measured, measure
from .objective import has_clip
from .reductions import token_weights
from .terms import Inputs, clipped_tokens, policy_term

if TYPE_CHECKING:
    from .advantages import AdvantagesCall
    from .loss import LossCall

LARGEST_LOG_RATIO = 20.0
SCALES = ("group", "batch", "none")


def grpo_loss(call: LossCall) -> GRPOOutput:
    tokens, objective = call.tokens, call.objective
    layout = layout_of(tokens.mask, tokens.cu_seqlens)
    dtype = torch.float64 if tokens.logp.dtype == torch.float64 else torch.float32
    # -inf minus -inf: the token keeps its place in lengths and weights, with the difference 0 and the weight 0
    impossible = layout.mask & (tokens.logp == -torch.inf)
    if tokens.old_logp is not None:
        impossible = impossible & (tokens.old_logp == -torch.inf)
    possible = layout._replace(mask=layout.mask & ~impossible)

    def constant(values: Tensor) -> Tensor:
        return possible.keep(values.detach().to(dtype))

    x = possible.keep(tokens.logp.to(dtype))
    old = x.detach() if tokens.old_logp is None else constant(tokens.old_logp)
    ref = None if tokens.ref_logp is None else constant(tokens.ref_logp)
    entropy = None if tokens.entropy is None else possible.keep(tokens.entropy.to(dtype))
    policy_weights = None if tokens.policy_weights is None else tokens.policy_weights.detach().to(dtype)
    if policy_weights is not None and policy_weights.shape == impossible.shape:
        policy_weights = policy_weights.masked_fill(impossible, 1.0)
    weights = (
        token_weights(layout, call.reduction, call.totals, tokens.cu_seqlens, dtype)
        if tokens.weights is None
        else tokens.weights
    )
    weights = constant(weights)

    log_ratio = x - old
    ratio = importance_ratio(layout, log_ratio, objective.ratio)
    if objective.ratio == "output":
        x = layout.spread(layout.total(x))
        ref = None if ref is None else layout.spread(layout.total(ref))
    advantages = constant(layout.to_tokens(tokens.advantages))
    inputs = Inputs(layout, x, log_ratio, ratio, advantages, policy_weights)

    policy_loss = layout.keep(weights * policy_term(inputs, objective)).sum()
    loss = policy_loss
    kl = None
    if ref is not None:
        kl = kl_estimate(objective.kl, x, ref, ratio, of_token=objective.ratio == "token")
        if objective.kl_coef != 0:
            loss = loss + objective.kl_coef * layout.keep(weights * kl).sum()
    if entropy is not None and objective.entropy_coef != 0:
        bonus_weights = weights if tokens.entropy_weights is None else constant(tokens.entropy_weights)
        loss = loss - objective.entropy_coef * (bonus_weights * entropy).sum()

    measured = Measured(
        loss=loss.detach(),
        policy_loss=policy_loss.detach(),
        kl=None if kl is None else kl.detach(),
        entropy=None if entropy is None else entropy.detach(),
        ratio=ratio.detach(),
        approx_kl=-log_ratio.detach(),
        impossible=impossible,
        clipped=clipped_tokens(inputs, objective) if has_clip(objective.variant) else None,
    )
    counted = possible.mask.to(dtype)
    once = layout.keep(layout.mask / layout.spread(layout.lengths(dtype).clamp(min=1)))
    metrics = measure(
        measured,
        possible.mask,
        # what a sequence has in common, all of its tokens have
        ratios=(possible.mask, counted) if objective.ratio == "token" else (layout.mask, once),
        kls=(layout.mask, once) if objective.ratio == "output" else (possible.mask, counted),
    )
    return GRPOOutput(loss, metrics)


def importance_ratio(layout: Layout, log_ratio: Tensor, level: str) -> Tensor:
    """c of every token: e^l of the token, the geometric mean over its sequence, or the ratio of the whole output."""
    if level == "token":
        return _exp(log_ratio)
    total = layout.total(log_ratio)
    if level == "sequence":
        return layout.spread(_exp(total / layout.lengths(total.dtype).clamp(min=1)))
    return layout.spread(total.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp())


def _exp(log_ratio: Tensor) -> Tensor:
    """e^l. Where it overflows, its derivative is infinite too, but 0 where the term bounds it (0 times infinity is NaN)."""
    largest = math.log(torch.finfo(log_ratio.dtype).max)
    overflows = log_ratio > largest
    # the square of a finite number: an upstream gradient of 0 meets no infinity on its way
    half = torch.where(overflows, log_ratio, 0.0) / 2
    root = (half - (half - half.clamp(max=largest)).detach()).exp()
    return torch.where(overflows, root * root, torch.where(overflows, 0.0, log_ratio).exp())


def group_advantages(call: AdvantagesCall) -> Tensor:
    """Computed in float64 (the rewards are few)."""
    rewards, valid, scale, eps = call.rewards, call.valid, SCALES[call.scale], call.eps.squeeze(0)
    size = rewards.shape[0]
    group, num_groups = _groups(rewards, call.group_size, call.group_ids)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    values = torch.where(valid, rewards.detach().double(), 0.0)

    def total(entries: Tensor) -> Tensor:
        """The sum over the group of each entry."""
        return entries.new_zeros(num_groups).index_add(0, group, entries).index_select(0, group)

    count = total(valid.double())
    sums = total(values)
    centred = torch.where(valid, values - sums / count.clamp(min=1), 0.0)
    if call.leave_one_out:
        advantages = values - (sums - values) / (count - 1).clamp(min=1)
    elif scale == "group":
        std = (total(centred.square()) / (count - 1).clamp(min=1)).sqrt()
        advantages = centred / (std + eps)
    elif scale == "batch":
        number = valid.sum()
        from_mean = torch.where(valid, values - values.sum() / number.clamp(min=1), 0.0)
        std = (from_mean.square().sum() / (number - 1).clamp(min=1)).sqrt()
        advantages = centred / (std + eps)
    else:
        advantages = centred

    # Equal rewards have no advantage, exactly: the rounding of their mean must not become one. NaN is kept.
    lowest = values.new_full((num_groups,), torch.inf)
    lowest = lowest.scatter_reduce(0, group, torch.where(valid, values, torch.inf), "amin")
    highest = values.new_full((num_groups,), -torch.inf)
    highest = highest.scatter_reduce(0, group, torch.where(valid, values, -torch.inf), "amax")
    equal = (highest <= lowest).index_select(0, group) if size else valid
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return torch.where(valid & ~equal, advantages, 0.0).to(dtype)


def _groups(rewards: Tensor, group_size: int, group_ids: Tensor | None) -> tuple[Tensor, int]:
    """The number of each entry's group, counted from 0, and how many groups there are at most."""
    size = rewards.shape[0]
    if group_ids is None:
        return torch.arange(size, device=rewards.device) // group_size, size // group_size
    ordered, order = group_ids.sort(stable=True)
    # A new group starts where the sorted ids change; the first entry is compared with the last one.
    ranks = (ordered != ordered.roll(1)).long().cumsum(0)
    return torch.empty_like(order).scatter(0, order, ranks), size + 1
