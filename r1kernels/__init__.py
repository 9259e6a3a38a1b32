"""r1kernels: kernels for training reasoning models, on CPUs and GPUs, exact and deterministic."""

from . import op
from .attention import DecodeLayout, SharedPrefix, decode_attention
from .backends import BackendError, explain, set_backend, set_strict, use_backend
from .checks import debug_checks
from .grpo import (
    GRPOOutput,
    group_advantages,
    grpo_loss,
    grpo_preset,
    importance_weights,
    linear_grpo_loss,
    off_policy_mask,
    reduction_weights,
    top_entropy_mask,
)
from .logprob import (
    GroupedLogprobs,
    grouped_logprobs,
    linear_divergence,
    linear_grouped_logprobs,
    linear_logprobs,
    linear_topk_divergence,
    sample_tokens,
    token_logprobs,
    topk_divergence,
)
from .moe import (
    Routing,
    grouped_gemm,
    load_balancing_loss,
    moe_experts,
    route,
    router_logits,
    router_z_loss,
    sequence_balance_loss,
    sort_by_expert,
    update_router_bias,
)

__version__ = "0.1.0"

op.declared()

__all__ = [
    "BackendError",
    "DecodeLayout",
    "GRPOOutput",
    "GroupedLogprobs",
    "Routing",
    "SharedPrefix",
    "debug_checks",
    "decode_attention",
    "explain",
    "group_advantages",
    "grouped_gemm",
    "grouped_logprobs",
    "grpo_loss",
    "grpo_preset",
    "importance_weights",
    "linear_divergence",
    "linear_grouped_logprobs",
    "linear_grpo_loss",
    "linear_logprobs",
    "linear_topk_divergence",
    "load_balancing_loss",
    "moe_experts",
    "off_policy_mask",
    "reduction_weights",
    "route",
    "router_logits",
    "router_z_loss",
    "sample_tokens",
    "sequence_balance_loss",
    "set_backend",
    "set_strict",
    "sort_by_expert",
    "token_logprobs",
    "top_entropy_mask",
    "topk_divergence",
    "update_router_bias",
    "use_backend",
]
