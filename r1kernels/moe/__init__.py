"""Mixture of experts: routing, balance, and the expert GEMMs, forward and backward."""

from . import triton_experts as triton_experts  # implements kernels
from . import triton_routing as triton_routing
from .balance import load_balancing_loss, router_z_loss, sequence_balance_loss, update_router_bias
from .experts import grouped_gemm, moe_experts
from .router_logits import router_logits
from .routing import Routing, route
from .sort import ExpertOrder, sort_by_expert

__all__ = [
    "ExpertOrder",
    "Routing",
    "grouped_gemm",
    "load_balancing_loss",
    "moe_experts",
    "route",
    "router_logits",
    "router_z_loss",
    "sequence_balance_loss",
    "sort_by_expert",
    "update_router_bias",
]
