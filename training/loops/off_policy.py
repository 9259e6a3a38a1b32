"""How far the sampler is from the policy that learns: its log-probs against the trainer's, and older weights than the step's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean

import torch
from torch import Tensor

import r1kernels
from training.engines import EngineError
from training.loops.sample import Completion
from training.recipe import Rollout

APART = 1e-3  # a log-prob that differs by more is counted


def staleness(completions: Sequence[Completion], step: int, rollout: Rollout) -> dict[str, float]:
    """Metrics: updates that the weights of a response lag behind those of `step`, on average, and the share that lags at all.

    Raises:
        EngineError: a response is not of this step's weights, and the recipe does not say that such ones are corrected.
    """
    lags = [step - each.version for each in completions]
    stale = sum(lag != 0 for lag in lags)
    if stale and rollout.stale == "refuse":
        found = next(each.version for each in completions if each.version != step)
        raise EngineError(
            f"{stale} of {len(lags)} responses are of other weights than the policy's: expected version {step}, got {found}; "
            "rollout.stale=correct weighs them instead"
        )
    return {"staleness": fmean(lags), "stale": stale / len(lags)}


def sampler_gap(completions: Sequence[Completion], old: Sequence[Tensor]) -> dict[str, float]:
    """Metrics: mean and maximum over the tokens of |sampler's log-prob - trainer's|, and the share of more than APART.

    old: the trainer's log-probs of the tokens of every response, before the first update.
    """
    if not completions:
        return {}
    gap = (torch.cat([*old]) - of_sampler(completions, old)).abs()
    return {
        "sampler_gap": float(gap.mean()),
        "sampler_gap_max": float(gap.max()),
        "sampler_gap_share": float((gap > APART).float().mean()),
    }


def corrections(
    completions: Sequence[Completion], old: Sequence[Tensor], rollout: Rollout
) -> list[Tensor] | None:
    """Weights of the tokens of every response, r1kernels.importance_weights; None where the recipe corrects nothing."""
    if rollout.stale == "refuse" or not completions:
        return None
    lengths = [len(each.token_ids) for each in completions]
    flat = torch.cat([*old])
    weights = r1kernels.importance_weights(
        flat,
        of_sampler(completions, old),
        torch.ones_like(flat, dtype=torch.bool),
        mode=rollout.importance_weights,
        high=rollout.importance_cap,
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], device=flat.device),
    )
    if rollout.importance_weights.startswith("sequence"):
        weights = weights.squeeze(1).repeat_interleave(torch.tensor(lengths, device=flat.device))
    return list(weights.split(lengths))


def of_sampler(completions: Sequence[Completion], like: Sequence[Tensor]) -> Tensor:
    """The sampler's log-probs of all tokens, on the device and in the dtype of `like`."""
    return torch.tensor([value for each in completions for value in each.logp]).to(like[0])
