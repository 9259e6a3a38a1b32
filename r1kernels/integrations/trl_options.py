"""The options of TRL's GRPOTrainer as keywords of ``r1kernels.grpo_loss``.

In TRL's words: ``beta`` is kl_coef, ``epsilon_low`` and ``epsilon_high`` are the clip, ``importance_sampling_level`` is ratio,
``loss_type`` names a variant and its reduction together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""The loss types with PPO's clip."""

REDUCTIONS = {
    "grpo": "sequence",
    "sapo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "vespo": "token",
    "dr_grpo": "constant",
    "luspo": "sequence-sum",
}
LEAST_LAMBDA = 1e-4  # of VESPO: TRL raises a smaller one to this
_LEVELS = ("token", "sequence")


def check_options(trainer: Any) -> None:
    """Raise ValueError for what TRL does not know, or knows but does not use with this ``loss_type``."""
    if trainer.loss_type not in REDUCTIONS:
        raise ValueError(f"loss_type: expected one of {', '.join(REDUCTIONS)}, got {trainer.loss_type!r}")
    if trainer.importance_sampling_level not in _LEVELS:
        raise ValueError(
            f"importance_sampling_level: expected one of {', '.join(_LEVELS)}, got {trainer.importance_sampling_level!r}"
        )
    if trainer.args.delta is not None and trainer.loss_type not in CLIPPED:
        raise ValueError(f"delta: not used by loss_type {trainer.loss_type!r}, got {trainer.args.delta}")


def bound_below_clip(trainer: Any) -> bool:
    """Whether TRL's ``delta`` bounds what its clip still lets through, for which ``grpo_loss`` has no term."""
    delta = trainer.args.delta
    return trainer.loss_type in CLIPPED and delta is not None and delta <= 1 + trainer.epsilon_high


def term_of(trainer: Any) -> dict[str, Any]:
    """The variant and its options."""
    args = trainer.args
    if trainer.loss_type == "vespo":
        for_gain = (args.vespo_k_pos, max(args.vespo_lambda_pos, LEAST_LAMBDA))
        for_loss = (args.vespo_k_neg, max(args.vespo_lambda_neg, LEAST_LAMBDA))
        return {"variant": "vespo", "vespo": (for_gain, for_loss)}
    level = {"ratio": trainer.importance_sampling_level}
    if trainer.loss_type == "sapo":
        return {"variant": "sapo", "tau": (args.sapo_temperature_pos, args.sapo_temperature_neg), **level}
    if trainer.loss_type == "cispo":
        return {"variant": "cispo", "clip_high": trainer.epsilon_high, **level}
    clip = {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high}
    return {"variant": "grpo", "delta": args.delta, **clip, **level}


def by_step(trainer: Any) -> bool:
    """Whether the loss is divided by the tokens of the whole optimizer step, accumulation included."""
    return trainer.loss_type in ("cispo", "dapo", "vespo")


def reduction_of(trainer: Any, mask: Tensor, num_items: Tensor) -> dict[str, Any]:
    """The reduction with the totals by which TRL divides; ``num_items`` is TRL's ``num_items_in_batch``."""
    reduction: dict[str, Any] = {"reduction": REDUCTIONS[trainer.loss_type]}
    accumulation = accumulation_of(trainer)
    if by_step(trainer):
        # the tokens of all ranks and of the whole generation batch, which holds several optimizer steps
        tokens = num_items.clamp(min=1) / trainer.accelerator.num_processes
        if trainer.model.training:
            tokens = tokens * accumulation / trainer.args.steps_per_generation
        return {**reduction, "num_tokens": tokens}
    if trainer.loss_type == "bnpo":
        return {**reduction, "num_tokens": mask.sum().clamp(min=1) * accumulation}
    totals = {"num_sequences": mask.shape[0] * accumulation}
    if trainer.loss_type == "dr_grpo":
        totals["max_length"] = trainer.max_completion_length
    return {**reduction, **totals}


def kl_of(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The KL term; nothing without one."""
    if trainer.beta == 0.0:
        return {}
    kl = "unbiased" if trainer.args.use_bias_correction_kl else "k3"
    return {"ref_logp": inputs["ref_per_token_logps"], "kl_coef": trainer.beta, "kl": kl}


def accumulation_of(trainer: Any) -> float:
    """The micro-batches of an optimizer step; 1 in evaluation, which accumulates nothing."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0


def mask_of(inputs: dict[str, Any]) -> Tensor:
    """The completion tokens that the policy wrote itself."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
