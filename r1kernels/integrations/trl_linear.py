"""The loss of TRL's GRPOTrainer from hidden states, by ``r1kernels.linear_grpo_loss``, where that fits.

It fits the defaults of TRL: one optimizer step a generation, so that the old log-probs are those of the step itself, and no
option that needs the log-prob or the entropy of single tokens beside the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..grpo import linear_grpo_loss
from . import trl_grpo
from .transformers_logprobs import head_inputs, output_head
from .trl_metrics import Tokens, log_metrics
from .trl_options import bound_below_clip, check_options, kl_of, mask_of, reduction_of, term_of


def compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """In place of ``GRPOTrainer._compute_loss``: the same loss, gradient and metrics; no log-probs where that fits.

    Where it does not fit, ``trl_grpo.compute_loss`` serves the call and one log line says why; in strict mode
    (``r1kernels.set_strict``) that is an error.
    """
    check_options(self)
    reason = why_not(self, model, inputs)
    if reason:
        trl_grpo.fall_back(
            f"GRPOTrainer's loss is not computed from hidden states: {reason}",
            "it is computed from log-probs",
        )
        return trl_grpo.compute_loss(self, model, inputs)
    mask, targets = mask_of(inputs), inputs["completion_ids"]
    with self.accelerator.autocast():
        hidden = head_inputs(
            model,
            input_ids=torch.cat([inputs["prompt_ids"], targets], dim=1),
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        )
        output = linear_grpo_loss(
            # the state before each completion token predicts it
            hidden[:, -targets.shape[1] - 1 : -1],
            targets=targets,
            old_logp=None,
            advantages=inputs["advantages"],
            mask=mask,
            temperature=self.temperature,
            entropy=True,
            **output_head(model)._asdict(),
            **term_of(self),
            **reduction_of(self, mask, inputs["num_items_in_batch"]),
            **kl_of(self, inputs),
        )
    # on policy every ratio is 1, whatever the log-probs are
    same = torch.zeros_like(mask, dtype=torch.float32)
    tokens = Tokens(same, same, None, inputs["advantages"], mask, None)
    log_metrics(self, "train" if self.model.training else "eval", tokens, dict(output.metrics), None)
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
