"""GRPO: advantages, losses with their KL and entropy terms, reductions and off-policy corrections."""

from . import one_pass as one_pass  # implements kernels
from . import triton as triton
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
