"""The loss of TRL's GRPOTrainer from hidden states, by ``r1kernels.linear_grpo_loss``, where that fits.

It fits the defaults of TRL: one optimizer step a generation, so that the old log-probs are those of the step itself, and no
option that needs the log-prob or the entropy of single tokens beside the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..grpo import linear_grpo_loss
from . import trl_grpo, trl_kept, trl_prefix
from .transformers_logprobs import head_inputs, output_head
from .trl_metrics import Tokens, log_metrics
from .trl_options import bound_below_clip, check_options, kl_of, mask_of, reduction_of, term_of


def compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """In place of ``GRPOTrainer._compute_loss``: the same loss, gradient and metrics; no log-probs where that fits.

    Where it does not fit, ``trl_grpo.compute_loss`` serves the call and one log line says why; in strict mode
    (``r1kernels.set_strict``) that is an error.
    """
    return _loss(self, model, inputs, states)


def compute_loss_shared(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """``compute_loss`` with each prompt computed once for its completions."""
    return _loss(self, model, inputs, trl_prefix.states)


def states(model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
    """The states (B, T, H) that predict the completion tokens."""
    hidden = head_inputs(model, input_ids=input_ids, attention_mask=attention_mask)
    return hidden[:, -logits_to_keep - 1 : -1]  # the state before each token predicts it


def _loss(trainer: Any, model: Any, inputs: dict[str, Any], states_of: Callable[..., Tensor]) -> Tensor:
    check_options(trainer)
    reason = why_not(trainer, model, inputs)
    if reason:
        trl_grpo.fall_back(
            f"GRPOTrainer's loss is not computed from hidden states: {reason}",
            "it is computed from log-probs",
        )
        return trl_grpo.compute_loss(trainer, model, inputs)
    mask, targets = mask_of(inputs), inputs["completion_ids"]
    with trainer.accelerator.autocast():
        hidden = states_of(
            model,
            torch.cat([inputs["prompt_ids"], targets], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            targets.shape[1],
        )
        output = linear_grpo_loss(
            hidden,
            targets=targets,
            old_logp=None,
            advantages=inputs["advantages"],
            mask=mask,
            temperature=trainer.temperature,
            entropy=True,
            kept=trl_kept.joined(inputs.get(trl_kept.KEY), targets.shape[1]),
            **output_head(model)._asdict(),
            **term_of(trainer),
            **reduction_of(trainer, mask, inputs["num_items_in_batch"]),
            **kl_of(trainer, inputs),
        )
    # on policy every ratio is 1, whatever the log-probs are
    same = torch.zeros_like(mask, dtype=torch.float32)
    tokens = Tokens(same, same, None, inputs["advantages"], mask, None)
    log_metrics(trainer, "train" if trainer.model.training else "eval", tokens, dict(output.metrics), None)
    return output.loss


def why_not(trainer: Any, model: Any, inputs: dict[str, Any]) -> str:
    """Why the loss of this call needs log-probs; empty if it does not."""
    needs = {
        "old_per_token_logps are given": "old_per_token_logps" in inputs,
        "loss_type is vespo": trainer.loss_type == "vespo",
        "off_policy_mask_threshold is set": trainer.off_policy_mask_threshold is not None,
        "top_entropy_quantile is below 1": trainer.top_entropy_quantile < 1.0,
        "there is an entropy bonus": trainer._entropy_bonus_enabled,
        "there is an auxiliary loss": trainer.aux_loss_enabled,
        "there are images": any(inputs.get(name) is not None for name in trl_grpo.IMAGES),
        "delta is not above 1 + epsilon_high": bound_below_clip(trainer),
        "the model is wrapped": trainer.accelerator.unwrap_model(model) is not model,
    }
    for reason, needed in needs.items():
        if needed:
            return reason
    try:
        output_head(model)
    except ValueError as error:
        return str(error)
    return ""
