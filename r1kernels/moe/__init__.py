"""Mixture of experts: routing, balance, and the expert GEMMs, forward and backward."""

from functools import partial

from .. import backends, devices
from . import autograd, reasons, reference
from . import triton_experts as triton_experts  # implements its ops
from . import triton_routing as triton_routing  # implements its ops
from .balance import load_balancing_loss, router_z_loss, sequence_balance_loss, update_router_bias
from .experts import grouped_gemm, moe_experts
from .routing import Routing, route
from .sort import ExpertOrder, sort_by_expert

__all__ = [
    "ExpertOrder",
    "Routing",
    "grouped_gemm",
    "load_balancing_loss",
    "moe_experts",
    "route",
    "router_z_loss",
    "sequence_balance_loss",
    "sort_by_expert",
    "update_router_bias",
]

for _op in (
    "grouped_gemm",
    "load_balancing_loss",
    "moe_experts",
    "route",
    "router_z_loss",
    "sequence_balance_loss",
    "sort_by_expert",
    "update_router_bias",
):
    backends.register(_op, "reference", getattr(reference, _op))

for _name, _device in (("cpu", devices.cpu), ("cuda", devices.cuda), ("triton", devices.triton)):
    for _op in ("grouped_gemm", "moe_experts", "route", "sort_by_expert"):
        _reasons = partial(getattr(reasons, _op), _device)
        backends.register(_op, _name, partial(getattr(autograd, _op), _name), _reasons)
