"""linear_grpo_loss: from hidden states and the output head to the GRPO loss, without keeping the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backends, checks
from ..logprob.linear import check_linear
from ..logprob.sharded import shard_of
from ..logprob.token import check_temperature
from .layout import layout_of
from .metrics import GRPOOutput
from .options import LossOptions, check_tensors, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    variant: str = "grpo",
    ratio: str | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    delta: float | None = None,
    dual_bound: float | None = None,
    tau: tuple[float, float] | None = None,
    vespo: tuple[tuple[float, float], tuple[float, float]] | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str | None = None,
    policy_weights: Tensor | None = None,
    entropy: bool = False,
    entropy_coef: float = 0.0,
    entropy_weights: Tensor | None = None,
    reduction: str = "sequence",
    weights: Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    max_length: int | float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> GRPOOutput:
    """``grpo_loss`` of ``linear_logprobs(hidden, weight, targets)``: the same numbers in one op.

    Args:
        hidden: (B, T, H), or packed (N, H) with ``cu_seqlens``: the states that predict the targets.
        weight: (V, H), the output head.
        targets: int64 (B, T) or (N,), the sampled tokens; only those that count must lie in [0, V).
        old_logp, advantages, mask: as in ``grpo_loss``.
        bias: (V,).
        temperature: a number above 0, or a tensor, () or one per token.
        softcap, logit_scale, group: as in ``linear_logprobs``.
        chunk_size: tokens whose logits stand in memory together; None chooses.
        entropy: measure the entropy of every token (a bool here: the op computes it); a bonus does so in any case.
        entropy_weights: as in ``grpo_loss``; needs ``entropy`` or a bonus.
        backend: the name of a backend: that one or an error; None chooses (see r1kernels.backends).

    Every other keyword is that of ``grpo_loss``. Gradients go to hidden, weight and bias, in their dtypes.

    Returns:
        GRPOOutput(loss, metrics), as ``grpo_loss`` does.

    Raises:
        ValueError, TypeError, IndexError: as ``grpo_loss`` and ``linear_logprobs`` do.

    Where the slope of a token follows from that token (grpo, dual_clip, cispo and sapo with token ratios, reinforce), the
    kernel backends compute the logits once, 6 N V H in all, and keep the gradients of their inputs until the backward, which
    scales them. Other terms need every log-prob first, and so does a vocabulary sharded over a group: the backward computes the
    logits again, or they are kept as ``linear_logprobs`` keeps them. Without gradients, 2 N V H.

    Precision: that of the two ops. NaN and inf in hidden states that do not count change nothing. Deterministic.
    """
    checks.boolean("entropy", entropy)
    if entropy_weights is not None and not entropy and entropy_coef == 0:
        raise ValueError("entropy_weights: needs entropy=True or an entropy_coef, got neither")
    options = resolve(
        LossOptions(
            variant=variant,
            ratio=ratio,
            clip_low=clip_low,
            clip_high=clip_high,
            delta=delta,
            dual_bound=dual_bound,
            tau=tau,
            vespo=vespo,
            ref_logp=ref_logp,
            kl_coef=kl_coef,
            kl=kl,
            policy_weights=policy_weights,
            entropy_coef=entropy_coef,
            entropy_weights=entropy_weights,
            reduction=reduction,
            weights=weights,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_length=max_length,
            cu_seqlens=cu_seqlens,
        )
    )
    checks.tensor("targets", targets, dtypes=(torch.int64,))
    checks.tensor("mask", mask, shape=tuple(targets.shape), like=targets)
    layout = layout_of(mask, cu_seqlens)
    checks.tensor("hidden", hidden, shape=(*targets.shape, None), like=targets)
    head = check_linear(hidden, weight, targets, bias, softcap, logit_scale)
    check_tensors(options, layout.num_sequences, old_logp, advantages, targets)
    temperature = check_temperature(temperature, targets, layout.mask, hidden.dtype)
    if chunk_size is not None:
        chunk_size = checks.integer("chunk_size", chunk_size, minimum=1)
    if checks.values_visible(targets):
        vocabulary = weight.shape[0] if group is None else shard_of(weight, group).vocabulary
        checks.in_range("targets", layout.keep(targets, 0), 0, vocabulary)
    return backends.dispatch(
        "linear_grpo_loss",
        backend,
        hidden,
        weight,
        targets,
        old_logp,
        advantages,
        mask,
        options._replace(entropy=entropy),
        bias=bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        chunk_size=chunk_size,
        group=group,
    )
