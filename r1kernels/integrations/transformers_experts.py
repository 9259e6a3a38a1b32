"""The experts of transformers' mixtures computed by ``r1kernels.moe_experts``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import moe as transformers_moe

from .. import backends, checks
from ..moe import moe_experts

NAME = "r1kernels"
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}  # classes of modules
_warned: set[tuple[type, str]] = set()


def register() -> None:
    """Make ``experts_implementation="r1kernels"`` known to transformers (call it before loading a model with that name)."""
    transformers_moe.ExpertsInterface.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module: ``moe_experts``, or transformers' grouped_mm where the module needs what it lacks.

    The fallback gives one warning for each module class and reason; in strict mode (``r1kernels.set_strict``) it is an error.
    """
    reason = _unsupported(self)
    if reason:
        _fall_back(type(self), reason)
        return transformers_moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if getattr(self, "_is_expert_parallel", True):
        # experts of other ranks: any index past the local ones is the sentinel
        top_k_index = top_k_index.clamp(max=self.num_experts)
    out = moe_experts(
        hidden_states.to(self.gate_up_proj.dtype),
        top_k_index,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        activation=_activation(self.act_fn),
    )
    return out.to(hidden_states.dtype)


def _unsupported(experts: Any) -> str:
    """Why ``moe_experts`` cannot serve this module; empty if it can. Flags only: shapes do not tell a layout."""
    expected = {
        "has_gate": True,
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    for flag, value in expected.items():
        if getattr(experts, flag, value) != value:
            return f"{flag} is {not value}"
    if getattr(type(experts), "_apply_gate", None) is not transformers_moe._default_apply_gate:
        return "it has a gate of its own (_apply_gate)"
    if not _activation(experts.act_fn):
        return f"its activation is {getattr(experts.act_fn, '__name__', type(experts.act_fn).__name__)}"
    if (
        experts.gate_up_proj.dtype not in checks.FLOATS
        or experts.down_proj.dtype != experts.gate_up_proj.dtype
    ):
        return f"its weights are {experts.gate_up_proj.dtype} and {experts.down_proj.dtype}"
    return ""


def _activation(function: Callable[[Tensor], Tensor]) -> str:
    """The name that ``moe_experts`` has for it; empty without one."""
    return "silu" if function is F.silu else _ACTIVATIONS.get(type(function).__name__, "")


def _fall_back(experts_class: type, reason: str) -> None:
    text = f"r1kernels does not serve {experts_class.__name__}, transformers' grouped_mm does: {reason}"
    if backends.strict():
        raise backends.BackendError(text + " (strict mode: no fallback)")
    if not torch.compiler.is_compiling() and (experts_class, reason) not in _warned:
        _warned.add((experts_class, reason))
        warnings.warn(text, RuntimeWarning, stacklevel=3)
