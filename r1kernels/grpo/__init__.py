"""GRPO: advantages, losses with their KL and entropy terms, reductions and off-policy corrections."""

from .. import backends
from . import reference
from .advantages import group_advantages
from .corrections import importance_weights, off_policy_mask, top_entropy_mask
from .linear import linear_grpo_loss
from .loss import grpo_loss
from .metrics import GRPOOutput, Metrics
from .presets import grpo_preset
from .reductions import reduction_weights

__all__ = [
    "GRPOOutput",
    "Metrics",
    "group_advantages",
    "grpo_loss",
    "grpo_preset",
    "importance_weights",
    "linear_grpo_loss",
    "off_policy_mask",
    "reduction_weights",
    "top_entropy_mask",
]

backends.register("group_advantages", "reference", reference.group_advantages)
backends.register("grpo_loss", "reference", reference.grpo_loss)
backends.register("linear_grpo_loss", "reference", reference.linear_grpo_loss)
