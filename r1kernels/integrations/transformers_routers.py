"""The routers of a model, and what runs in the place of those that ``route`` serves.

T tokens of one forward, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import route
from .routing_record import ExpertLoad, RoutingRecord, RoutingReplay
from .transformers_experts import register
from .transformers_match import ARGUMENT, Match, rows_of_experts
from .transformers_match import match as match_router
from .transformers_prefix_attention import current


@dataclass
class Control:
    """What happens at the routers of one model now, and what it had before it was patched."""

    experts_implementation: dict[str, str | None]
    load: ExpertLoad | None = None
    attention_mask: Tensor | None = None
    record: RoutingRecord | None = None
    replay: RoutingReplay | None = None


@dataclass
class PatchedRouter:
    """What a patched router carries (as ``_r1kernels``; a copy of the model carries copies)."""

    layer: int
    match: Match
    control: Control
    replayed: bool = False  # its last forward in training was a replay

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # a model that was loaded from a file names our experts
        self.__dict__.update(state)


@dataclass
class UnservedRouter:
    """What the experts carry (as ``_r1kernels``) whose router stays as it is."""

    why: str
    control: Control

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()
        self.__dict__.update(state)


class _Trial(threading.local):
    running = False


_trial = _Trial()


@contextmanager
def unobserved() -> Iterator[None]:
    """Route live and leave no trace in records, loads and replays, in the forwards of this thread in a ``with`` block."""
    outer, _trial.running = _trial.running, True
    try:
        yield
    finally:
        _trial.running = outer


def _router_forward(self: Any, hidden_states: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of a patched router: (logits, weights, indices)."""
    state: PatchedRouter = self._r1kernels
    match = state.match
    logits = match.logits(self, hidden_states)
    options = match.options(self, *arguments)
    indices = options.pop("indices")  # given by the ids of the tokens
    if _trial.running:
        routing = route(logits.float(), **options, indices=indices)
        return match.first(logits), match.weights(self, routing, logits, hidden_states), routing.indices
    control, recomputing = state.control, _recomputing()
    if recomputing and state.replayed and control.replay is None:
        raise RuntimeError(
            "replay_routing: under activation checkpointing the backward must run inside the block of its forward"
        )
    if control.replay is not None:
        with torch.no_grad():
            live = route(logits.float(), **options, indices=indices).indices
        indices = control.replay.choose(state.layer, live, compare=not recomputing)
    routing = route(logits.float(), **options, indices=indices)
    weights = match.weights(self, routing, logits, hidden_states)
    if control.replay is not None:
        weights = control.replay.weigh(state.layer, weights)
    if not recomputing:
        if self.training or torch.is_grad_enabled():
            state.replayed = control.replay is not None
        if control.record is not None:
            control.record.add(state.layer, routing.indices, weights)
        if control.load is not None:
            counts, tree = control.attention_mask, current()
            if tree is not None and counts is None:
                counts = tree.multiplicity  # as often as the repeated form computes each token
            control.load.add(state.layer, routing.indices, counts)
    return match.first(logits), weights, routing.indices


def _recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing computes it a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def install(router: Any, layer: int, match: Match, control: Control) -> None:
    """Let a router run ``_router_forward``; deleting ``forward`` and ``_r1kernels`` undoes it."""
    router._r1kernels = PatchedRouter(layer, match, control)
    router.forward = partial(_router_forward, router)  # which copies and pickles with the router


@dataclass
class Block:
    """Experts of transformers' experts interface and the router beside them."""

    name: str  # of the module that holds both
    experts_name: str
    experts: Any
    router_name: str = ""
    router: Any = None
    match: Match | str = "no module beside its experts has a row for each of them"  # or why there is none


def find_blocks(model: nn.Module) -> list[Block]:
    """The mixtures of a model in module order.

    The router is the module beside the experts that ``match`` knows; where there is none, the first with a row for each
    expert is named with the reason why it is not known.
    """
    return [
        _block(name, module, experts_name, _inside_adapters(child))
        for name, module in model.named_modules()
        if not hasattr(module, "base_layer")
        for experts_name, child in module.named_children()
        if hasattr(_inside_adapters(child), "_apply_gate")
    ]


def _block(name: str, module: nn.Module, experts_name: str, experts: Any) -> Block:
    found = Block(name, experts_name, experts)
    children = sorted(module.named_children(), key=lambda named: named[0] not in ("gate", "router"))
    for router_name, child in children:
        router = _inside_adapters(child)
        if router is experts or not rows_of_experts(router, experts.num_experts):
            continue
        known = match_router(router, experts.num_experts)
        if isinstance(known, Match) or found.router is None:
            found = Block(name, experts_name, experts, router_name, router, known)
        if isinstance(known, Match):
            break
    return found


def _inside_adapters(module: Any) -> Any:
    """The module in the layers that PEFT puts around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def selection_bias(model: nn.Module, router: Any) -> Tensor | None:
    """The selection bias (E,) of a patched router, which it holds itself or the block around it hands over."""
    match: Match = router._r1kernels.match
    if match.selection_bias != ARGUMENT:
        return match.bias(router)
    for block in model.modules():
        if any(_inside_adapters(child) is router for child in block.children()) and not hasattr(
            block, "base_layer"
        ):
            held = [*block.parameters(recurse=False), *block.buffers(recurse=False)]
            found = [tensor for tensor in held if tensor.shape == (match.experts,)]
            return found[0] if len(found) == 1 else None
    return None
