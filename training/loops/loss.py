"""The policy loss of one micro-batch: from its tokens to the output of r1kernels.grpo_loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import r1kernels
from r1kernels.grpo.reductions import REDUCTIONS
from r1kernels.integrations import transformers as integration
from training.loops.batch import Batch, Logprobs, head_logprobs, states
from training.recipe import Grpo


def policy_loss(
    policy: PreTrainedModel,
    batch: Batch,
    old: Sequence[Tensor],
    ref: Sequence[Tensor] | None,
    weights: Sequence[Tensor] | None,
    advantages: Tensor,
    config: Grpo,
    totals: dict[str, int],
    seen: list[Logprobs] | None = None,
) -> r1kernels.GRPOOutput:
    """The forward pass under the policy and its loss; call it and its backward inside of `batch.routed`.

    With config.fused_loss, from the hidden states in one op (no (N, V) logits, no log-probs); else log-probs first.

    Args:
        old, ref: log-probs of the tokens of every response of the batch.
        weights: what the policy term of each token is multiplied with, likewise.
        advantages: (B,).
        totals: responses, tokens and longest length of the whole minibatch.
        seen: where given, the log-probs and entropies of the batch are put there, which one op alone does not tell.
    """
    hidden = states(policy, batch)
    arguments = {
        "old_logp": torch.cat([*old]),
        "advantages": advantages.to(hidden.device).unsqueeze(1),
        "mask": torch.ones_like(batch.targets, dtype=torch.bool),
        "ref_logp": None if ref is None else torch.cat([*ref]),
        "policy_weights": None if weights is None else torch.cat([*weights]),
        "cu_seqlens": batch.cu_seqlens,
        **loss_arguments(config, totals),
    }
    if seen is not None:
        logp, entropy = head_logprobs(
            policy, batch, hidden, temperature=config.temperature, return_entropy=True
        )
        seen.append(Logprobs(logp.detach(), entropy.detach(), math.nan))
        return r1kernels.grpo_loss(logp, **arguments)
    if not config.fused_loss:
        return r1kernels.grpo_loss(
            head_logprobs(policy, batch, hidden, temperature=config.temperature), **arguments
        )
    return r1kernels.linear_grpo_loss(
        hidden,
        targets=batch.targets,
        temperature=config.temperature,
        kept=batch.kept,
        **integration.output_head(policy)._asdict(),
        **arguments,
    )


def loss_arguments(config: Grpo, totals: dict[str, int]) -> dict[str, Any]:
    """Keyword arguments of r1kernels.grpo_loss for a recipe.

    What the recipe leaves at its default is left to the op (None): the variant decides. What it sets goes there, and the op
    refuses by name what the variant does not know.
    """
    clip = None if config.clip == Grpo.clip else config.clip
    return {
        "variant": config.variant,
        "reduction": config.reduction,
        "kl_coef": config.kl_coef,
        "clip_low": clip,
        "clip_high": clip,
        "ratio": None if config.ratio == Grpo.ratio else config.ratio,
        **{name: totals[name] for name in REDUCTIONS.get(config.reduction, ())},
    }
