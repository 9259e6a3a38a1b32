"""Weights and masks for samples that the trained policy did not quite make; all are policy_weights of grpo_loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .layout import advantages_of, layout_of

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance_weights(
    old_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    *,
    mode: str,
    low: float | None = None,
    high: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """exp(o - s): how much likelier the trainer finds a token, or a whole sequence, than the sampler reported.

    Sampler and trainer compute the same log-probs by different kernels, hence the correction (truncated or masked
    importance sampling).

    Args:
        old_logp: o, the trainer's log-probs under the policy that sampled, (B, T), or (N,) with ``cu_seqlens``.
        sampler_logp: s, as the sampler reported them, likewise; a NaN (not reported) counts as no difference, and so does -inf (outside
            a kept set) where o is -inf too.
        mask: bool or integer, likewise; 0: the token counts as no difference.
        mode: "token_..." weighs tokens, "sequence_..." sequences, by the exponential of the **sum** of o - s; "...truncate"
            moves a weight into [low, high], "...mask" replaces one outside by 0.
        low, high: the bounds, at least 0; None: none on that side.
        cu_seqlens: int32 or int64 (B + 1,), the boundaries of packed sequences.

    Returns:
        float32 weights without gradient: one per token, or (B, 1) for the sequence modes (packed too).

    Raises:
        ValueError: an unknown mode, low above high, a wrong shape. TypeError: a wrong type or dtype.

    Precision: float32. Source: TRL's and verl's truncated importance sampling.
    """
    checks.tensor("old_logp", old_logp, dtypes=checks.FLOATS)
    tokens = tuple(old_logp.shape)
    checks.tensor("sampler_logp", sampler_logp, dtypes=checks.FLOATS, shape=tokens, like=old_logp)
    checks.tensor("mask", mask, shape=tokens, like=old_logp)
    checks.choice("mode", mode, MODES)
    for name, bound in (("low", low), ("high", high)):
        if bound is not None and checks.number(name, bound) < 0:
            raise ValueError(f"{name}: expected at least 0, got {bound}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low: expected at most high = {high}, got {low}")
    layout = layout_of(mask, cu_seqlens)
    level, action = mode.split("_")
    difference = layout.keep(torch.where(sampler_logp.isnan(), 0.0, _drift(sampler_logp, old_logp)))
    if level == "sequence":
        difference = layout.total(difference).unsqueeze(1)
    weights = difference.exp()
    if action == "truncate":
        return weights if low is None and high is None else weights.clamp(low, high)
    if low is not None:
        weights = torch.where(weights < low, 0.0, weights)
    if high is not None:
        weights = torch.where(weights > high, 0.0, weights)
    return weights


def off_policy_mask(
    logp: Tensor,
    sampler_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    threshold: float,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Which sequences to learn from: not those with A < 0 that the policy has left, mean(s - x) > threshold.

    Args:
        logp: x, log-probs under the policy being trained, (B, T), or (N,) with ``cu_seqlens``.
        sampler_logp: s, as the sampler reported them, likewise; give the old log-probs where there are none. A NaN counts
            as no difference, and so does -inf where x is -inf too.
        advantages: (B,) or (B, 1), or one per token. A packed (N,) with N = B is read as one per sequence.
        mask: bool or integer, shaped like ``logp``.
        threshold: in nats a token.
        cu_seqlens: int32 or int64 (B + 1,), the boundaries of packed sequences.

    Returns:
        bool, True to keep: (B, 1) (packed too), or one per token if ``advantages`` are.

    Raises:
        ValueError: a wrong shape. TypeError: a wrong type or dtype.

    Source: DeepSeek-V3.2 (2512.02556), off-policy sequence masking.
    """
    checks.tensor("logp", logp, dtypes=checks.FLOATS)
    tokens = tuple(logp.shape)
    checks.tensor("sampler_logp", sampler_logp, dtypes=checks.FLOATS, shape=tokens, like=logp)
    checks.tensor("mask", mask, shape=tokens, like=logp)
    checks.number("threshold", threshold)
    layout = layout_of(mask, cu_seqlens)
    advantages = advantages_of(advantages, layout.num_sequences, logp)
    drift = layout.total(torch.where(sampler_logp.isnan(), 0.0, _drift(logp, sampler_logp)))
    far = drift / layout.lengths(drift.dtype).clamp(min=1) > threshold
    if advantages.shape == (layout.num_sequences, 1):
        return ~((advantages < 0) & far.unsqueeze(1))
    return ~((advantages < 0) & layout.spread(far))


def top_entropy_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The counted tokens of highest entropy: H >= the (1 - quantile) quantile of the entropies of counted tokens.

    Args:
        entropy: H, any shape.
        mask: bool or integer, shaped like ``entropy``.
        quantile: the share to keep, in (0, 1] (0.2: the top fifth); between two tokens the threshold is interpolated.

    Returns:
        bool, shaped like ``entropy``; False where the mask is 0.

    Raises:
        ValueError: a quantile outside (0, 1], a wrong shape. TypeError: a wrong type or dtype.

    Precision: float32; the rank in float64. No host sync. Source: Beyond the 80/20 Rule (2506.01939).
    """
    checks.tensor("entropy", entropy, dtypes=checks.FLOATS)
    checks.tensor("mask", mask, shape=tuple(entropy.shape), like=entropy)
    if checks.positive("quantile", quantile) > 1:
        raise ValueError(f"quantile: expected a number in (0, 1], got {quantile}")
    counted = mask != 0
    if entropy.numel() == 0:
        return counted
    values = torch.where(counted, entropy.detach().float(), torch.inf)
    ordered = values.flatten().sort().values
    rank = (1 - quantile) * (counted.sum().double() - 1).clamp(min=0)
    below, above = ordered.index_select(0, torch.stack((rank.floor(), rank.ceil())).long()).unbind()
    return counted & (values >= torch.lerp(below, above, (rank - rank.floor()).float()))


def _drift(logp: Tensor, other_logp: Tensor) -> Tensor:
    """``other_logp`` - ``logp`` in float32 without gradient; 0 where both are -inf."""
    logp, other_logp = logp.detach().float(), other_logp.detach().float()
    return torch.where(logp == other_logp, 0.0, other_logp - logp)
