"""What TRL's GRPOTrainer logs with its loss, under TRL's names.

B completions of at most T tokens; c is the importance ratio, (B, T), or (B, 1) at sequence level.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .trl_options import CLIPPED


class Tokens(NamedTuple):
    """The completion tokens of one call, (B, T) but for the advantages, (B,) or (B, T)."""

    logp: Tensor
    entropy: Tensor
    old_logp: Tensor | None
    advantages: Tensor
    mask: Tensor
    important: Tensor | None
    """The tokens of highest entropy, where only they are learnt from."""

    @property
    def counted(self) -> Tensor:
        """The tokens that the entropy bonus acts on."""
        return self.mask if self.important is None else self.mask * self.important


def log_metrics(
    trainer: Any, mode: str, tokens: Tokens, measured: dict[str, Tensor], sampler_ratio: Tensor | None
) -> None:
    """Append the metrics of one call; ``measured`` are those of ``grpo_loss``. One copy to the host for all means."""
    mask, count = tokens.mask, tokens.mask.sum()

    def total(values: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of values and their number; (B, 1) are one per sequence."""
        if values.shape[1] == 1:
            return values.sum(), torch.full_like(count, values.shape[0])
        return (values * mask).sum(), count

    totals = {"entropy": (measured["entropy"] * count, count)}
    if trainer.beta != 0.0:
        totals["kl"] = (measured["kl"] * count, count)
    advantages = tokens.advantages
    if advantages.ndim == 1:
        advantages = advantages.unsqueeze(1)
    log_ratio = tokens.logp.detach() - (tokens.logp.detach() if tokens.old_logp is None else tokens.old_logp)
    metrics = trainer._metrics[mode]
    if trainer.loss_type in CLIPPED:
        ratio = _ratio(trainer, log_ratio, mask)
        low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
        for name, flags in (("low", low), ("high", high), ("region", low | high)):
            totals[f"clip_ratio/{name}_mean"] = total(flags)
        metrics["clip_ratio/low_min"].append(_extreme(trainer, low, mask, torch.amin))
        metrics["clip_ratio/high_max"].append(_extreme(trainer, high, mask, torch.amax))
    elif trainer.loss_type == "cispo":
        totals["cispo_clip_ratio"] = total(
            (_ratio(trainer, log_ratio, mask) > trainer.epsilon_high) & (advantages > 0)
        )
    elif trainer.loss_type == "vespo":
        args = trainer.args
        for_gain = {"k_pos": args.vespo_k_pos, "lambda_pos": args.vespo_lambda_pos}
        for_loss = {"k_neg": args.vespo_k_neg, "lambda_neg": args.vespo_lambda_neg}
        phi = trainer.get_gamma_weights(advantages, log_ratio, mask, sampler_ratio, **for_gain, **for_loss)
        totals["vespo/phi_seq_mean"] = total(phi)
    sums = torch.stack([torch.stack([value.float() for value in pair]) for pair in totals.values()])
    sums = trainer.accelerator.reduce(sums, reduction="sum")
    for name, mean in zip(totals, (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), strict=True):
        metrics[name].append(mean)


def log_policy_loss(
    trainer: Any,
    mode: str,
    loss: Tensor,
    tokens: Tokens,
    bonus: dict[str, Any],
    *,
    by_step: bool,
    accumulation: float,
) -> None:
    """Append the loss without the entropy bonus, and not yet divided by the accumulation steps where TRL divides last."""
    given = (bonus["entropy_weights"] * tokens.mask * tokens.entropy.detach()).sum()
    policy_loss = loss.detach() + bonus["entropy_coef"] * given
    if not by_step:
        policy_loss = policy_loss * accumulation
    trainer._metrics[mode]["policy_loss"].append(trainer.accelerator.gather(policy_loss).nanmean().item())


def add_to_entropy_window(trainer: Any, mode: str, tokens: Tokens) -> None:
    """Append the coefficient of the entropy bonus and, where it is adaptive, move it at the end of an optimizer step.

    It moves by the mean entropy of all tokens of the step, over its micro-batches and all ranks.
    """
    if mode != "train":
        return
    args = trainer.args
    if trainer.use_adaptive_entropy:
        counted = tokens.counted
        window = torch.stack([(tokens.entropy.detach() * counted).sum(), counted.sum()])
        before = trainer._entropy_window_stats
        trainer._entropy_window_stats = window if before is None else before + window
    if not trainer.accelerator.sync_gradients:
        return
    if trainer.use_adaptive_entropy:
        total, count = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum").tolist()
        entropy = total / max(count, 1.0)
        if entropy <= args.entropy_target:
            coef = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
        else:
            coef = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
        trainer.entropy_coef, trainer._last_world_entropy = coef, entropy
        trainer._entropy_window_stats = None
    trainer._metrics[mode]["entropy_coef"].append(trainer.entropy_coef)


def _ratio(trainer: Any, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """c at the level of the trainer."""
    if trainer.importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1)).unsqueeze(-1)
    return log_ratio.exp()


def _extreme(trainer: Any, flags: Tensor, mask: Tensor, pick: Any) -> float:
    """The smallest or largest share of flagged tokens in a sequence, over all ranks; NaN where no sequence has a token."""
    share = flags.squeeze(1).float() if flags.shape[1] == 1 else (flags * mask).sum(-1) / mask.sum(-1)
    shares = trainer.accelerator.gather(share)
    shares = shares[~shares.isnan()]
    return float(pick(shares)) if shares.numel() else float("nan")
