"""The experts of transformers' mixtures computed by ``r1kernels.moe_experts``, or around ``r1kernels.grouped_gemm``.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows, R rank of an adapter.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers.integrations import moe as transformers_moe

from .. import backends, checks
from ..moe import grouped_gemm, moe_experts, sort_by_expert
from ..moe.experts import ACTIVATIONS
from ..moe.reference import gated

NAME = "r1kernels"
# What an experts module may say of itself (transformers' use_experts_implementation), with what moe_experts takes.
_FLAGS = {
    "has_gate": True,
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
}
_gates: dict[Any, Gate | None] = {}  # what a trial of a class and its numbers found
_warned: set[tuple[type, str]] = set()


class Gate(NamedTuple):
    """What ``moe_experts`` is told of a gate."""

    activation: str
    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0


def register() -> None:
    """Make ``experts_implementation="r1kernels"`` known to transformers (call it before loading a model with that name)."""
    transformers_moe.ExpertsInterface.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module: ``moe_experts`` where it computes what the module does, else the module's own gate
    (and biases, and norm) between two ``grouped_gemm``.

    Weights of a dtype that neither takes go to transformers' grouped_mm, with one warning for each module class and reason;
    in strict mode (``r1kernels.set_strict``) that is an error.
    """
    reason = unsupported(self)
    if reason:
        _fall_back(type(self), reason)
        return transformers_moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if getattr(self, "_is_expert_parallel", True):
        # experts of other ranks: any index past the local ones is the sentinel
        top_k_index = top_k_index.clamp(max=self.num_experts)
    if not_fused(self):
        return _between_products(self, hidden_states, top_k_index, top_k_weights)
    activation, *numbers = gate_of(self)
    # new numbers: Dynamo has no guard for those of assume_constant_result
    alpha, limit, shift = (1.0 * number for number in numbers)
    gate_up, down = weights_of(self, "gate_up_proj"), weights_of(self, "down_proj")
    out = moe_experts(
        hidden_states.to(gate_up.whole.dtype),
        top_k_index,
        top_k_weights,
        gate_up.whole,
        down.whole,
        activation=activation,
        alpha=alpha,
        limit=None if limit == math.inf else limit,
        shift=shift,
        lora=_lora(gate_up, down),
    )
    return out.to(hidden_states.dtype)


class Weights(NamedTuple):
    """The matrices ``whole + scale * left @ right`` of the experts."""

    whole: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    scale: float = 1.0


def weights_of(experts: Any, name: str) -> Weights:
    """A parameter of an experts module, and the factors that one adapter of PEFT (``target_parameters``) adds to it.

    PEFT parametrizes the module for the time of a forward; to read the parameter would multiply the factors. Parametrized in
    another way (several adapters, say) it is what the parametrization makes of it.
    """
    if parametrize.is_parametrized(experts, name):
        found = experts.parametrizations[name]
        if len(found) == 1 and all(hasattr(found[0], factor) for factor in ("lhs", "rhs", "scaling")):
            return Weights(found.original, found[0].lhs, found[0].rhs, found[0].scaling)
    return Weights(getattr(experts, name))


def _lora(
    gate_up: Weights, down: Weights
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float] | None:
    if gate_up.left is None and down.left is None:
        return None
    up_b, down_b, scale = gate_up.left, down.left, gate_up.scale if down.left is None else down.scale
    if up_b is not None and down_b is not None and gate_up.scale != down.scale:
        up_b, down_b, scale = up_b * gate_up.scale, down_b * down.scale, 1.0
    return gate_up.right, up_b, down.right, down_b, scale


def _between_products(self: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Experts of any kind: two grouped products, and the module's own code for what stands between and behind them."""
    experts, top_k = self.num_experts, index.shape[1]
    offsets, permutation, inverse = sort_by_expert(index, experts)
    expert = index.reshape(-1)[permutation].clamp(max=experts - 1)

    def product(rows: Tensor, name: str) -> Tensor:
        whole, left, right, scale = weights_of(self, name)
        rows = rows.to(whole.dtype)
        out = grouped_gemm(rows, whole, offsets, transposed=self.is_transposed)
        if left is not None and right is not None:
            if self.is_transposed:
                left, right = right, left
            low = scale * grouped_gemm(rows, right, offsets, transposed=self.is_transposed)
            out = out + grouped_gemm(low, left, offsets, transposed=self.is_transposed)
        return out + getattr(self, f"{name}_bias")[expert] if self.has_bias else out

    rows = product(hidden_states[permutation // top_k], "gate_up_proj" if self.has_gate else "up_proj")
    rows = product(self._apply_gate(rows) if self.has_gate else self.act_fn(rows), "down_proj")
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    rows = rows[inverse].view(*index.shape, -1).float()
    # a sentinel's row holds the bias at least
    out = rows * weights.masked_fill(index == experts, 0.0).float().unsqueeze(-1)
    return out.sum(dim=1).to(hidden_states.dtype)


def unsupported(experts: Any) -> str:
    """Why no op of r1kernels can serve this module; empty if one can."""
    up = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    dtypes = {weights_of(experts, name).whole.dtype for name in (up, "down_proj")}
    if len(dtypes) == 1 and dtypes <= set(checks.FLOATS):
        return ""
    return f"its weights are {' and '.join(sorted(map(str, dtypes)))}"


def not_fused(experts: Any) -> str:
    """Why ``moe_experts`` does not compute this module; empty if it does. By its flags: shapes do not tell a layout."""
    for flag, value in _FLAGS.items():
        if getattr(experts, flag, value) != value:
            return f"{flag} is {not value}"
    if gate_of(experts):
        return ""
    activation = getattr(experts, "act_fn", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    default = getattr(type(experts), "_apply_gate", None) is transformers_moe._default_apply_gate
    return f"its activation is {name}" if default else "it has a gate of its own"


@torch._dynamo.assume_constant_result
def gate_of(experts: Any) -> tuple[Any, ...]:
    """The fields of the Gate that theirs is, found on random numbers; empty without one. (Dynamo keeps plain tuples.)"""
    activation = getattr(experts, "act_fn", None)
    scalars = {name: value for name, value in vars(experts).items() if isinstance(value, (int, float, str))}
    key = (type(experts)._apply_gate, type(activation), getattr(activation, "__name__", ""), *scalars.items())
    if key not in _gates:
        with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            _gates[key] = _matching_gate(experts, scalars)
    found = _gates[key]
    return () if found is None else tuple(found)


def _matching_gate(experts: Any, scalars: dict[str, Any]) -> Gate | None:
    positive = {name: value for name, value in scalars.items() if isinstance(value, float) and value > 0}
    limits = [value for name, value in positive.items() if "limit" in name]
    alphas = [value for name, value in positive.items() if "alpha" in name]
    candidates = [
        Gate(activation, limit=limit) for limit in (math.inf, *limits) for activation in ACTIVATIONS
    ]
    candidates += [Gate("silu", alpha, limit, 1.0) for limit in limits for alpha in alphas]
    generator = torch.Generator("cpu").manual_seed(0)
    # some far out, where a clamp shows
    far = 10.0 * max([1.0, *limits])
    pre = torch.randn(64, 64, generator=generator, device="cpu", dtype=torch.float32)
    pre *= torch.linspace(0.1, far, 64, device="cpu", dtype=torch.float32)
    try:
        own = experts._apply_gate(pre.clone())
    except (AttributeError, RuntimeError, TypeError):  # weights of its own, say
        return None
    for gate in candidates:
        ours = gated(pre, ACTIVATIONS.index(gate.activation), gate.alpha, gate.limit, gate.shift)
        if own.shape == ours.shape and torch.allclose(ours, own):
            return gate
    return None


def computed_by(experts: Any) -> str:
    """One line that says which op computes this module, or why none does."""
    if why := unsupported(experts):
        return f"transformers' grouped_mm, since {why}"
    if why := not_fused(experts):
        return f"grouped_gemm around its own gate, since {why}"
    gate = Gate(*gate_of(experts))
    numbers = [
        f"{name} {value:g}"
        for name, value in gate._asdict().items()
        if name != "activation" and value != Gate._field_defaults[name]
    ]
    return ", ".join(["moe_experts", gate.activation, *numbers])


def fallen_back(experts_class: type, reason: str) -> str:
    """What a warning says of experts that are not served; none follows at their first forward."""
    _warned.add((experts_class, reason))
    return f"{experts_class.__name__} are computed by transformers' grouped_mm: {reason}"


def _fall_back(experts_class: type, reason: str) -> None:
    text = f"r1kernels does not serve {experts_class.__name__}, transformers' grouped_mm does: {reason}"
    if backends.strict():
        raise backends.BackendError(text + " (strict mode: no fallback)")
    if not torch.compiler.is_compiling() and (experts_class, reason) not in _warned:
        _warned.add((experts_class, reason))
        warnings.warn(text, RuntimeWarning, stacklevel=3)
