"""The loss of TRL's GRPOTrainer computed by ``r1kernels.grpo_loss``, with the metrics that TRL logs.

B completions of at most T tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from .. import backends
from ..grpo import GRPOOutput, grpo_loss, off_policy_mask, reduction_weights
from .patching import check_reads, check_signature
from .trl_metrics import Tokens, add_to_entropy_window, log_metrics, log_policy_loss
from .trl_options import (
    accumulation_of,
    bound_below_clip,
    by_step,
    check_options,
    kl_of,
    mask_of,
    reduction_of,
    term_of,
)

_log = logging.getLogger("r1kernels")
_logged: set[str] = set()
_own_compute_loss = GRPOTrainer._compute_loss
IMAGES = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
           "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")  # fmt: skip
_READS = {
    *(f"inputs[{name}]" for name in (
        "advantages", "completion_ids", "completion_mask", "importance_sampling_ratio", "num_items_in_batch",
        "old_per_token_logps", "prompt_ids", "prompt_mask", "ref_per_token_logps", "sampling_per_token_logps",
        "tool_mask", *IMAGES,
    )),
    *(f"self.args.{name}" for name in (
        "delta", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target", "sapo_temperature_neg",
        "sapo_temperature_pos", "steps_per_generation", "use_bias_correction_kl", "vespo_k_neg", "vespo_k_pos",
        "vespo_lambda_neg", "vespo_lambda_pos",
    )),
    *(f"self.{name}" for name in (
        "_entropy_bonus_enabled", "_entropy_window_stats", "_get_per_token_logps_and_entropies", "_last_world_entropy",
        "_metrics", "accelerator", "args", "aux_loss_enabled", "beta", "current_gradient_accumulation_steps",
        "entropy_coef", "epsilon_high", "epsilon_low", "get_gamma_weights", "get_high_entropy_mask",
        "get_off_policy_mask", "importance_sampling_level", "loss_type", "max_completion_length", "model",
        "off_policy_mask_threshold", "router_aux_loss_coef", "top_entropy_quantile", "use_adaptive_entropy", "use_vllm",
        "vllm_importance_sampling_correction",
    )),
}  # fmt: skip
"""Everything that the loss of a known TRL depends on (1.15 and 1.16)."""


def check_trainer() -> None:
    """Check that the installed ``GRPOTrainer._compute_loss`` depends on what ``compute_loss`` knows, and on nothing else.

    Raises:
        ValueError: it is patched already. RuntimeError: it has other parameters, or reads an option, an input or a method
            that is not known here or no longer reads one that is.
    """
    name = "trl.GRPOTrainer._compute_loss"
    check_signature(name, GRPOTrainer._compute_loss, ("self", "model", "inputs"))
    check_reads(name, GRPOTrainer._compute_loss, _READS)


def compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """In place of ``GRPOTrainer._compute_loss``: the same loss, gradient and metrics.

    A ``delta`` of at most 1 + epsilon_high is left to TRL's own method, with one log line.

    Raises:
        ValueError: an option that TRL does not know, or does not use with this ``loss_type``; what ``grpo_loss`` raises.
        BackendError: what is left to TRL, in strict mode (``r1kernels.set_strict``).
    """
    check_options(self)
    if bound_below_clip(self):
        fall_back(
            f"GRPOTrainer's loss is not computed by grpo_loss: delta is {self.args.delta}, not above 1 + epsilon_high",
            "TRL computes it",
        )
        own: Tensor = _own_compute_loss(self, model, inputs)
        return own
    mask = mask_of(inputs)
    logp, entropy, aux_loss = self._get_per_token_logps_and_entropies(
        model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].shape[1],
        compute_entropy=True,
        compute_aux_loss=self.aux_loss_enabled,
        **{name: inputs.get(name) for name in IMAGES},
    )
    important = None
    if self.top_entropy_quantile < 1.0:
        # a quantile over all ranks, which TRL's own method gathers
        important = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
    tokens = Tokens(logp, entropy, inputs.get("old_per_token_logps"), inputs["advantages"], mask, important)

    accumulation = accumulation_of(self)
    bonus = _entropy_bonus(self, tokens, accumulation) if self._entropy_bonus_enabled else {}
    losses = _losses(self, tokens, inputs, bonus)
    loss = losses[0].loss if len(losses) == 1 else losses[0].loss + losses[1].loss
    measured = {name: value for output in losses for name, value in output.metrics.items()}
    mode = "train" if self.model.training else "eval"
    if self._entropy_bonus_enabled:
        log_policy_loss(self, mode, loss, tokens, bonus, by_step=by_step(self), accumulation=accumulation)
        add_to_entropy_window(self, mode, tokens)
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
    log_metrics(self, mode, tokens, measured, inputs.get("importance_sampling_ratio"))
    return loss


def fall_back(problem: str, instead: str) -> None:
    """Log once that something else computes a loss; in strict mode an error."""
    if backends.strict():
        raise backends.BackendError(problem + " (strict mode: no fallback)")
    if problem not in _logged:
        _logged.add(problem)
        _log.info("%s; %s", problem, instead)


def _losses(trainer: Any, tokens: Tokens, inputs: dict[str, Any], bonus: dict[str, Any]) -> list[GRPOOutput]:
    """The loss as one call of ``grpo_loss``, or as two whose sum it is."""
    term, kl = term_of(trainer), kl_of(trainer, inputs)
    reduction = reduction_of(trainer, tokens.mask, inputs["num_items_in_batch"])
    selected = _selected(trainer, tokens, inputs)
    bonus = {"entropy": tokens.entropy, **bonus}

    def run(advantages: Tensor, **keywords: Any) -> GRPOOutput:
        return grpo_loss(tokens.logp, tokens.old_logp, advantages, tokens.mask, **keywords)

    if trainer.loss_type != "vespo":
        weights = selected
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            weights = [*selected, inputs["importance_sampling_ratio"]]
        return [run(tokens.advantages, policy_weights=_product(weights), **term, **reduction, **kl, **bonus)]
    # VESPO takes policy weights into the weight of the whole sequence: tokens are left out by their weight in the
    # loss instead, and the KL, which they do not concern, stands apart
    w = reduction_weights(tokens.mask, **reduction)
    for mask in selected:
        w = w * mask
    ratio = inputs.get("importance_sampling_ratio")
    outputs = [run(tokens.advantages, policy_weights=ratio, weights=w, **term, **bonus)]
    if kl:
        level = trainer.importance_sampling_level
        outputs.append(run(torch.zeros_like(tokens.advantages), ratio=level, **reduction, **kl))
    return outputs


def _selected(trainer: Any, tokens: Tokens, inputs: dict[str, Any]) -> list[Tensor]:
    """The masks that keep sequences or tokens out of the policy term."""
    selected = []
    if trainer.off_policy_mask_threshold is not None:
        old = tokens.logp.detach() if tokens.old_logp is None else tokens.old_logp
        sampler = inputs.get("sampling_per_token_logps", old)
        threshold = trainer.off_policy_mask_threshold
        selected.append(off_policy_mask(tokens.logp, sampler, tokens.advantages, tokens.mask, threshold))
    if tokens.important is not None:
        selected.append(tokens.important)
    return selected


def _product(weights: list[Tensor]) -> Tensor | None:
    product = None
    for one in weights:
        product = one if product is None else product * one
    return product


def _entropy_bonus(trainer: Any, tokens: Tokens, accumulation: float) -> dict[str, Any]:
    """The coefficient, and the weights of a mean over the tokens that count (the important ones where they are chosen)."""
    coef = trainer.entropy_coef
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coef = 0.0
    counted = tokens.counted
    share = counted / counted.sum().clamp(min=1) / accumulation
    return {"entropy_coef": coef, "entropy_weights": share.to(tokens.logp.dtype)}
