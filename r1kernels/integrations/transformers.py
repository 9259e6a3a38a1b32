"""r1kernels under the models of transformers: log-probs of any causal language model, routing and experts of mixtures.

    from r1kernels.integrations import transformers as r1

    logp = r1.fused_logprobs(model, input_ids, attention_mask, labels)      # without the logits

    tree = r1.prefix_tree(prompt_ids, completion_ids)                       # lists of token ids
    logp = r1.shared_prefix_logprobs(model, tree)                           # each shared token once

    with r1.patch(model):                              # or r1.patch(model) ... r1.unpatch(model)
        with r1.record_routing(model) as record:
            sequences = model.generate(...)
        with r1.replay_routing(model, r1.pad_routing(record.sequences(mask), mask)), r1.collect_load(model) as load:
            loss(model(...)).backward()
        r1.update_bias(model, load, rate=1e-3)         # once per optimizer step

``register()`` alone gives ``from_pretrained(..., experts_implementation="r1kernels")``, the experts without the router.
T tokens of one forward, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from .. import checks
from ..moe import update_router_bias
from .prefix_tree import PrefixTree, prefix_tree
from .routing_record import ExpertLoad, RoutingRecord, RoutingReplay, pad_routing
from .transformers_experts import NAME, experts_forward, register
from .transformers_logprobs import fused_logprobs, head_inputs, output_head
from .transformers_prefix import explain_shared_prefix, shared_prefix_logprobs, shared_prefix_states
from .transformers_routers import ROUTERS, Control, check_router, install

__all__ = [
    "ExpertLoad",
    "Patch",
    "PrefixTree",
    "RoutingRecord",
    "RoutingReplay",
    "collect_load",
    "experts_forward",
    "explain_shared_prefix",
    "fused_logprobs",
    "head_inputs",
    "output_head",
    "pad_routing",
    "patch",
    "prefix_tree",
    "record_routing",
    "register",
    "replay_routing",
    "shared_prefix_logprobs",
    "shared_prefix_states",
    "unpatch",
    "update_bias",
]


class Patch:
    """A patched model; ``undo()``, or leaving it as a context manager, restores the model."""

    def __init__(self, model: Any) -> None:
        self._model: Any = model

    def undo(self) -> None:
        """Give the model its own routers and experts back; a second call does nothing."""
        if self._model is not None:
            unpatch(self._model)
        self._model = None

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
        model: a ``PreTrainedModel``, on its device and with its weights; adapters of PEFT and ``fully_shard`` may come before
            or after. Under ``fully_shard`` every rank must call it.
        experts: another experts implementation of transformers ("eager", "grouped_mm", ...) in the place of ours.

    Returns:
        Patch, with ``undo()``; also a context manager. A copy of the model (``copy.deepcopy``, ``torch.save`` and ``torch.load``) is
        patched too, for itself: ``unpatch`` undoes that.

    Raises:
        ValueError: the model has no experts that transformers' experts interface serves, is already patched, or has a
            router that is not known or asks for what ``route`` does not compute (more experts per token than its groups hold).
        RuntimeError: this version of transformers has another router under a known name (attributes, signature, or
            other weights on random tokens). Nothing is changed then.
    """
    routers = _find_routers(model)
    for block, router in routers.items():
        check_router(block, router)
    register()
    previous = model.get_experts_implementation()
    model.set_experts_implementation(experts)
    control = Control(previous)
    for layer, router in enumerate(routers.values()):
        install(router, layer, control)
    return Patch(model)


def unpatch(model: Any) -> None:
    """Give a patched model its own routers and experts back: one that ``patch`` took, a copy of it, or one loaded from a file.

    Raises:
        ValueError: the model is not patched.
    """
    routers = _patched(model)
    model.set_experts_implementation(routers[0]._r1kernels.control.experts_implementation)
    for router in routers:
        del router.forward, router._r1kernels


def _find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers in module order, one beside each experts module; each under the name of the block that holds both."""
    routers = {}
    for name, module in model.named_modules():
        if hasattr(module, "_r1kernels"):
            raise ValueError(
                f"model: expected a model that is not patched yet, got one whose {name} is (a copy of a patched model is "
                "patched too); unpatch(model) undoes it"
            )
        children = [_inside_adapters(child) for child in module.children()]
        if hasattr(module, "base_layer") or not any(hasattr(child, "_apply_gate") for child in children):
            continue
        known = [child for child in children if type(child).__name__ in ROUTERS]
        if len(known) != 1:
            found = ", ".join(type(child).__name__ for child in children)
            raise ValueError(
                f"model: expected a router among {', '.join(ROUTERS)} in {name} ({type(module).__name__}), got {found}"
            )
        routers[name] = known[0]
    if not routers:
        raise ValueError(f"model: expected a model with experts, got {type(model).__name__} without any")
    return routers


def _inside_adapters(module: Any) -> Any:
    """The module in the layers that PEFT puts around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


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
