"""The policy loss of one micro-batch: from its tokens to the output of r1kernels.grpo_loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import r1kernels
from r1kernels.integrations import transformers as integration
from training.loops.batch import Batch, head_logprobs, states
from training.recipe import Grpo


def policy_loss(
    policy: PreTrainedModel,
    batch: Batch,
    old: Sequence[Tensor],
    ref: Sequence[Tensor] | None,
    advantages: Tensor,
    config: Grpo,
    totals: dict[str, int],
) -> r1kernels.GRPOOutput:
    """The forward pass under the policy and its loss; call it and its backward inside of `batch.routed`.

    With config.fused_loss, from the hidden states in one op (no (N, V) logits, no log-probs); else log-probs first.

    Args:
        old, ref: log-probs of every response of the batch, each (L,) for some L.
        advantages: (B,).
        totals: responses, tokens and longest length of the whole minibatch.
    """
    width, mask = batch.targets.shape[1], batch.response_mask
    old_logp = _stack(old, width)
    ref_logp = None if ref is None else _stack(ref, width)
    advantages = advantages.to(old_logp)
    arguments = loss_arguments(config, totals)
    hidden = states(policy, batch)
    if not config.fused_loss:
        logp, _ = head_logprobs(policy, batch, hidden, config.temperature)
        return r1kernels.grpo_loss(logp, old_logp, advantages, mask, ref_logp=ref_logp, **arguments)
    return r1kernels.linear_grpo_loss(
        hidden,
        targets=batch.targets[mask],
        old_logp=old_logp[mask],
        advantages=advantages,
        mask=torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device),
        ref_logp=None if ref_logp is None else ref_logp[mask],
        cu_seqlens=torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)),
        temperature=config.temperature,
        **integration.output_head(policy)._asdict(),
        **arguments,
    )


def loss_arguments(config: Grpo, totals: dict[str, int]) -> dict[str, Any]:
    """Keyword arguments of r1kernels.grpo_loss for a recipe.

    A clip or ratio that the variant does not know goes there too where the recipe sets it: the op refuses it by name.
    """
    arguments: dict[str, Any] = {
        "variant": config.variant,
        "reduction": config.reduction,
        "kl_coef": config.kl_coef,
    }
    if config.variant in ("grpo", "dual_clip", "gmpo") or config.clip != Grpo.clip:
        arguments |= {"clip_low": config.clip, "clip_high": config.clip}
    if config.variant in ("grpo", "dual_clip", "cispo", "sapo") or config.ratio != Grpo.ratio:
        arguments["ratio"] = config.ratio
    needed = {
        "sequence": ("num_sequences",),
        "sequence-sum": ("num_sequences",),
        "token": ("num_tokens",),
        "constant": ("num_sequences", "max_length"),
    }
    return arguments | {name: totals[name] for name in needed.get(config.reduction, ())}


def _stack(values: Sequence[Tensor], width: int) -> Tensor:
    """Rows of log-probs, cut or padded by 0 to one width."""
    stacked = values[0].new_zeros((len(values), width))
    for row, value in enumerate(values):
        length = min(width, value.shape[0])
        stacked[row, :length] = value[:length]
    return stacked
