"""r1kernels under the models of transformers: log-probs of any causal language model, routing and experts of mixtures.

    from r1kernels.integrations import transformers as r1

    logp = r1.fused_logprobs(model, input_ids, attention_mask, labels)      # without the logits

    with r1.patch(model):                              # or patch = r1.patch(model) ... patch.undo()
        with r1.record_routing(model) as record:
            sequences = model.generate(...)
        with r1.replay_routing(model, r1.pad_routing(record.sequences(mask), mask)), r1.collect_load(model) as load:
            loss(model(...)).backward()
        r1.update_bias(model, load, rate=1e-3)         # once per optimizer step

``register()`` alone gives ``from_pretrained(..., experts_implementation="r1kernels")``, the experts without the router.
T tokens of one forward, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers.integrations import moe as transformers_moe

from .. import backends, checks
from ..moe import moe_experts, update_router_bias
from .routing_record import ExpertLoad, RoutingRecord, RoutingReplay, pad_routing
from .transformers_logprobs import fused_logprobs, output_head
from .transformers_routers import ROUTERS, Control, check_router, install

__all__ = [
    "ExpertLoad",
    "Patch",
    "RoutingRecord",
    "RoutingReplay",
    "collect_load",
    "experts_forward",
    "fused_logprobs",
    "output_head",
    "pad_routing",
    "patch",
    "record_routing",
    "register",
    "replay_routing",
    "update_bias",
]

NAME = "r1kernels"
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}
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
        activation=_ACTIVATIONS[type(self.act_fn).__name__],
    )
    return out.to(hidden_states.dtype)


def _unsupported(experts: Any) -> str:
    """Why ``moe_experts`` can not serve this module; empty if it can. Flags only: shapes do not tell a layout."""
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
    if type(experts.act_fn).__name__ not in _ACTIVATIONS:
        return f"its activation is {type(experts.act_fn).__name__}"
    if (
        experts.gate_up_proj.dtype not in checks.FLOATS
        or experts.down_proj.dtype != experts.gate_up_proj.dtype
    ):
        return f"its weights are {experts.gate_up_proj.dtype} and {experts.down_proj.dtype}"
    return ""


def _fall_back(experts_class: type, reason: str) -> None:
    text = f"r1kernels does not serve {experts_class.__name__}, transformers' grouped_mm does: {reason}"
    if backends.strict():
        raise backends.BackendError(text + " (strict mode: no fallback)")
    if not torch.compiler.is_compiling() and (experts_class, reason) not in _warned:
        _warned.add((experts_class, reason))
        warnings.warn(text, RuntimeWarning, stacklevel=3)


class Patch:
    """A patched model; ``undo()``, or leaving it as a context manager, restores the model."""

    def __init__(self, model: Any, routers: list[nn.Module], previous: dict[str, str | None]) -> None:
        self._model, self._routers, self._previous = model, routers, previous

    def undo(self) -> None:
        """Give the model its own routers and experts back; a second call does nothing."""
        for router in self._routers:
            del router.forward, router._r1kernels
        if self._routers:
            self._model.set_experts_implementation(self._previous)
        self._routers = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def patch(model: Any, experts: str = NAME) -> Patch:
    """Let a transformers model route with ``r1kernels.route`` and compute its experts with ``r1kernels.moe_experts``.

    Served routers: DeepSeek-V3, GLM-4-MoE (sigmoid with selection bias), DeepSeek-V2, Mixtral, OLMoE, Qwen2-MoE and
    Qwen3-MoE (softmax). Router logits, weights and indices come out as the model's own router gives them, except that
    ties go to the lowest index and that routers which ask for float32 get it under autocast too.

    Args:
        model: a ``PreTrainedModel``, on its device and with its weights.
        experts: another experts implementation of transformers ("eager", "grouped_mm", ...) in the place of ours.

    Returns:
        Patch, with ``undo()``; also a context manager. Copies of the model (``copy.deepcopy``) are patched too, for themselves.

    Raises:
        ValueError: the model has no experts that transformers' experts interface serves, is already patched, or has a
            router that is not known.
        RuntimeError: this version of transformers has another router under a known name (attributes, signature, or
            other weights on random tokens). Nothing is changed then.
    """
    routers = _find_routers(model)
    for router in routers:
        check_router(router)
    register()
    previous = model.get_experts_implementation()
    model.set_experts_implementation(experts)
    control = Control()
    for layer, router in enumerate(routers):
        install(router, layer, control)
    return Patch(model, routers, previous)


def _find_routers(model: nn.Module) -> list[nn.Module]:
    """The routers in module order, one beside each experts module."""
    routers = []
    for name, module in model.named_modules():
        if hasattr(module, "_r1kernels"):
            raise ValueError(f"model: expected a model that is not patched yet, got one whose {name} is")
        children = list(module.children())
        if not any(hasattr(child, "_apply_gate") for child in children):
            continue
        known = [child for child in children if type(child).__name__ in ROUTERS]
        if len(known) != 1:
            found = ", ".join(type(child).__name__ for child in children)
            raise ValueError(
                f"model: expected a router among {', '.join(ROUTERS)} in {name} ({type(module).__name__}), got {found}"
            )
        routers += known
    if not routers:
        raise ValueError(f"model: expected a model with experts, got {type(model).__name__} without any")
    return routers


@contextmanager
def collect_load(
    model: nn.Module, load: ExpertLoad | None = None, attention_mask: Tensor | None = None
) -> Iterator[ExpertLoad]:
    """Count the tokens that each expert gets in the forwards of a ``with`` block; recomputation is not counted again.

    Args:
        model: a patched model, or one that contains it.
        load: where to add the counts (of other micro-batches of the same optimizer step); a new one if None.
        attention_mask: any shape with one entry per token of each forward: tokens where it is 0 do not count.

    Yields:
        ExpertLoad, for ``update_bias`` and as a metric.
    """
    routers = _patched(model)
    control = routers[0]._r1kernels.control
    if load is None:
        load = ExpertLoad(len(routers), routers[0].weight.shape[0])
    with _set(control, load=load, attention_mask=attention_mask):
        yield load


def update_bias(
    model: nn.Module, load: ExpertLoad, rate: float, group: torch.distributed.ProcessGroup | None = None
) -> None:
    """Move the selection bias of every router towards an even load (``update_router_bias``); once per optimizer step.

    Where torch.distributed is initialised the load is summed over the ranks of ``group`` (default: all), so every rank
    must call it. The biases are buffers: whatever copies weights to a reference model or a rollout engine must copy
    buffers too.

    Raises:
        ValueError: the model is not patched or no router has a selection bias; also what ``update_router_bias`` raises.
    """
    routers = _patched(model)
    if not any(hasattr(router, "e_score_correction_bias") for router in routers):
        raise ValueError(
            f"model: expected routers with a selection bias, got {type(routers[0]).__name__} without"
        )
    counts = load.counts
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.to(routers[0].weight.device, copy=True)
        torch.distributed.all_reduce(counts, group=group)
    for router in routers:
        if hasattr(router, "e_score_correction_bias"):
            bias = router.e_score_correction_bias
            update_router_bias(bias, counts[router._r1kernels.layer].to(bias.device), rate)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the expert choices of all forwards of a patched model in a ``with`` block (recomputation is left out).

    Yields:
        RoutingRecord: ``forward()`` for one plain forward, ``sequences(attention_mask)`` for a generation.
    """
    routers = _patched(model)
    record = RoutingRecord(len(routers))
    with _set(routers[0]._r1kernels.control, record=record):
        yield record


@contextmanager
def replay_routing(model: nn.Module, routing: RoutingRecord | Tensor) -> Iterator[RoutingReplay]:
    """Route as recorded, with live weights, in the forwards of a ``with`` block.

    The expert choices are those of ``routing``; their weights, and so all gradients, come from the live logits. Tokens
    without a record are routed live. Under activation checkpointing the backward belongs into the block too.

    Args:
        model: a patched model with as many routers as the recorded one.
        routing: a record of one forward, or (layers, T, K) int16 or int64, for example of ``pad_routing``, with -1
            in all K places of a token without a record. Each forward in the block must have these T tokens.

    Yields:
        RoutingReplay, whose ``agreement`` is the share of choices that the live router would have made too.
    """
    routers = _patched(model)
    recorded = routing.forward() if isinstance(routing, RoutingRecord) else routing
    shape = (len(routers), None, routers[0].top_k)
    checks.tensor("routing", recorded, dtypes=(torch.int16, torch.int64), shape=shape)
    replay = RoutingReplay(recorded)
    with _set(routers[0]._r1kernels.control, replay=replay):
        yield replay


def _patched(model: nn.Module) -> list[Any]:
    routers: list[Any] = [module for module in model.modules() if hasattr(module, "_r1kernels")]
    if not routers:
        raise ValueError("model: expected a model patched by r1kernels.integrations.transformers.patch")
    if any(router._r1kernels.control is not routers[0]._r1kernels.control for router in routers):
        raise ValueError("model: expected one patched model, got a module that holds several")
    return routers


@contextmanager
def _set(control: Control, **values: Any) -> Iterator[None]:
    before = {name: getattr(control, name) for name in values}
    for name, value in values.items():
        setattr(control, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(control, name, value)
