"""The experts of transformers' mixtures computed by ``r1kernels.moe_experts``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import moe as transformers_moe

from .. import backends, checks
from ..moe import moe_experts
from ..moe.experts import ACTIVATIONS
from ..moe.reference import gated

NAME = "r1kernels"
# What an experts module may say of itself (transformers' use_experts_implementation), with the default, and what is served.
_FLAGS = {
    "has_gate": True,
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
}
_gates: dict[Any, str] = {}  # what a trial of a class and its numbers found
_warned: set[tuple[type, str]] = set()


def register() -> None:
    """Make ``experts_implementation="r1kernels"`` known to transformers (call it before loading a model with that name)."""
    transformers_moe.ExpertsInterface.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module: ``moe_experts``, or transformers' grouped_mm where the module needs what it lacks.

    The fallback gives one warning for each module class and reason; in strict mode (``r1kernels.set_strict``) it is an error.
    """
    reason = unsupported(self)
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
        activation=gate_of(self),
    )
    return out.to(hidden_states.dtype)


def unsupported(experts: Any) -> str:
    """Why ``moe_experts`` cannot serve this module; empty if it can. Flags only: shapes do not tell a layout."""
    for flag, value in _FLAGS.items():
        if getattr(experts, flag, value) != value:
            return f"{flag} is {not value}"
    if not gate_of(experts):
        activation = getattr(experts, "act_fn", None)
        name = getattr(activation, "__name__", type(activation).__name__)
        return (
            f"its activation is {name}"
            if _has_default_gate(experts)
            else "it has a gate of its own (_apply_gate)"
        )
    if (
        experts.gate_up_proj.dtype not in checks.FLOATS
        or experts.down_proj.dtype != experts.gate_up_proj.dtype
    ):
        return f"its weights are {experts.gate_up_proj.dtype} and {experts.down_proj.dtype}"
    return ""


@torch._dynamo.assume_constant_result
def gate_of(experts: Any) -> str:
    """The activation of ``moe_experts`` that its gate is, found on random numbers; empty without one."""
    activation = getattr(experts, "act_fn", None)
    scalars = [(name, value) for name, value in vars(experts).items() if isinstance(value, (int, float, str))]
    key = (type(experts)._apply_gate, type(activation), getattr(activation, "__name__", ""), *scalars)
    if key not in _gates:
        generator = torch.Generator("cpu").manual_seed(0)
        # some far out, where a clamp shows
        pre = torch.randn(64, 64, generator=generator, device="cpu") * torch.logspace(-1, 2, 64, device="cpu")
        with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            try:
                own = experts._apply_gate(pre.clone())
            except (AttributeError, RuntimeError, TypeError):  # weights of its own, say
                own = pre
            found = [name for name in ACTIVATIONS if torch.allclose(gated(pre, ACTIVATIONS.index(name)), own)]
        _gates[key] = found[0] if found else ""
    return _gates[key]


def _has_default_gate(experts: Any) -> bool:
    return getattr(type(experts), "_apply_gate", None) is transformers_moe._default_apply_gate


def fallen_back(experts_class: type, reason: str) -> str:
    """What a warning says of experts that are not served."""
    _warned.add((experts_class, reason))
    return f"{experts_class.__name__} are computed by transformers' grouped_mm: {reason}"


def _fall_back(experts_class: type, reason: str) -> None:
    text = f"r1kernels does not serve {experts_class.__name__}, transformers' grouped_mm does: {reason}"
    if backends.strict():
        raise backends.BackendError(text + " (strict mode: no fallback)")
    if not torch.compiler.is_compiling() and (experts_class, reason) not in _warned:
        _warned.add((experts_class, reason))
        warnings.warn(text, RuntimeWarning, stacklevel=3)
