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

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from .. import backends, checks
from ..moe import update_router_bias
from .prefix_tree import PrefixTree, prefix_tree
from .routing_record import ExpertLoad, RoutingRecord, RoutingReplay, pad_routing
from .transformers_experts import NAME, computed_by, experts_forward, fallen_back, register, unsupported
from .transformers_kept import KeptRecord, kept_sets, record_kept
from .transformers_logprobs import fused_logprobs, head_inputs, output_head
from .transformers_match import Match
from .transformers_prefix import explain_shared_prefix, shared_prefix_logprobs, shared_prefix_states
from .transformers_routers import (
    Block,
    Control,
    PatchedRouter,
    UnservedRouter,
    find_blocks,
    install,
    selection_bias,
)

__all__ = [
    "ExpertLoad",
    "KeptRecord",
    "Patch",
    "PrefixTree",
    "RoutingRecord",
    "RoutingReplay",
    "collect_load",
    "experts_forward",
    "explain",
    "explain_shared_prefix",
    "fused_logprobs",
    "has_selection_bias",
    "head_inputs",
    "kept_sets",
    "output_head",
    "pad_routing",
    "patch",
    "prefix_tree",
    "record_kept",
    "record_routing",
    "register",
    "replay_routing",
    "router_names",
    "routes",
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

    A router is served when it does what ``route`` does: a trial with random weights, once for each class and config, compares
    logits, weights, indices and gradients; ``explain(model)`` says what it found. Router logits, weights and indices then
    come out as the model's own router gives them, except that ties go to the lowest index and that routers which ask for
    float32 get it under autocast too. What is not served stays as transformers has it, with one warning that says why;
    in strict mode (``r1kernels.set_strict``) that is an error.

    Args:
        model: a ``PreTrainedModel``, on any device, the meta device too; adapters of PEFT and ``fully_shard`` may come before
            or after.
        experts: another experts implementation of transformers ("eager", "grouped_mm", ...) in the place of ours.

    Returns:
        Patch, with ``undo()``; also a context manager. A copy of the model (``copy.deepcopy``, ``torch.save`` and ``torch.load``) is
        patched too, for itself: ``unpatch`` undoes that.

    Raises:
        ValueError: the model has no experts that transformers' experts interface serves, or is already patched.
        BackendError: strict mode is on, and a router or experts are not served. Nothing is changed then.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_r1kernels"):
            raise ValueError(
                f"model: expected a model that is not patched yet, got one whose {name} is (a copy of a patched model is "
                "patched too); unpatch(model) undoes it"
            )
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(f"model: expected a model with experts, got {type(model).__name__} without any")
    _tell_unserved(model, blocks, experts)
    register()
    previous = model.get_experts_implementation()
    model.set_experts_implementation(experts)
    control = Control(previous)
    for layer, block in enumerate(blocks):
        if isinstance(block.match, str):
            block.experts._r1kernels = UnservedRouter(block.match, control)
        else:
            install(block.router, layer, block.match, control)
    return Patch(model)


def _tell_unserved(model: Any, blocks: list[Block], experts: str) -> None:
    """One warning, or in strict mode an error, that names what transformers goes on computing."""
    where: dict[str, list[str]] = {}
    for block in blocks:
        if isinstance(block.match, str):
            router = type(block.router).__name__ if block.router is not None else "its router"
            said = f"{router} routes itself, without routing replay and load, since {block.match}"
            where.setdefault(said, []).append(block.name)
        if experts == NAME and (why := unsupported(block.experts)):
            said = fallen_back(type(block.experts), why)
            where.setdefault(said, []).append(block.name)
    if not where:
        return
    parts = [
        f"{said} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"
        for said, names in where.items()
    ]
    text = f"model: r1kernels serves {type(model).__name__} in part: {'; '.join(parts)}"
    if backends.strict():
        raise backends.BackendError(text + " (strict mode: no fallback)")
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def explain(model: nn.Module) -> str:
    """A table of the mixtures of a transformers model, patched or not: whether r1kernels serves each router and its experts,
    as what, or why not. A line for all layers that have the same answer.

    Raises:
        ValueError: the model has no experts that transformers' experts interface serves.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(f"model: expected a model with experts, got {type(model).__name__} without any")
    where: dict[str, list[str]] = {}
    for block in blocks:
        router = type(block.router).__name__ if block.router is not None else "its router"
        served = isinstance(block.match, Match)
        where.setdefault(
            f"{router}: {f'route, {block.match}' if served else f'transformers, since {block.match}'}", []
        ).append(f"{block.name}.{block.router_name}" if block.router is not None else block.name)
        where.setdefault(f"{type(block.experts).__name__}: {computed_by(block.experts)}", []).append(
            f"{block.name}.{block.experts_name}"
        )
    return "\n".join(
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {said}"
        for said, names in where.items()
    )


def unpatch(model: Any) -> None:
    """Give a patched model its own routers and experts back: one that ``patch`` took, a copy of it, or one loaded from a file.

    Raises:
        ValueError: the model is not patched.
    """
    patched = _patched(model)
    model.set_experts_implementation(patched[0]._r1kernels.control.experts_implementation)
    for module in patched:
        if isinstance(module._r1kernels, PatchedRouter):
            del module.forward
        del module._r1kernels


@contextmanager
def collect_load(
    model: nn.Module, load: ExpertLoad | None = None, attention_mask: Tensor | None = None
) -> Iterator[ExpertLoad]:
    """Count the tokens that each expert gets in the forwards of a ``with`` block; recomputation is not counted again.

    Args:
        model: a patched model, or one that contains it.
        load: where to add the counts (of other micro-batches of the same optimizer step); a new one if None.
        attention_mask: any shape with one integer per token of each forward, how often it counts: 0 at padding. None: each
            token once, and in a forward over a ``PrefixTree`` as often as sequences share it.

    Yields:
        ExpertLoad, for ``update_bias`` and as a metric.
    """
    routers = _routers(model)
    control = routers[0]._r1kernels.control
    if load is None:
        load = ExpertLoad(len(routers), max(router._r1kernels.match.experts for router in routers))
    with _set(control, load=load, attention_mask=attention_mask):
        yield load


def has_selection_bias(model: nn.Module) -> bool:
    """Whether routers of a patched model have a selection bias, which ``update_bias`` moves.

    Raises:
        ValueError: the model is not patched, or a router of it is not served.
    """
    return any(selection_bias(model, router) is not None for router in _routers(model))


def update_bias(
    model: nn.Module,
    load: ExpertLoad,
    rate: float,
    group: torch.distributed.ProcessGroup | None = None,
    summed: bool = False,
) -> None:
    """Move the selection bias of every router towards an even load (``update_router_bias``); once per optimizer step.

    Where torch.distributed is initialised the load is summed over the ranks of ``group`` (default: all), so every rank
    must call it, unless it is ``summed`` already. The biases are buffers: whatever copies weights to a reference model or a
    rollout engine must copy buffers too.

    Raises:
        ValueError: the model is not patched or no router has a selection bias; also what ``update_router_bias`` raises.
    """
    checks.boolean("summed", summed)
    routers = _routers(model)
    biases = [selection_bias(model, router) for router in routers]
    if all(bias is None for bias in biases):
        raise ValueError(
            f"model: expected routers with a selection bias, got {type(routers[0]).__name__} without"
        )
    counts = load.counts
    if not summed and torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.to(next(bias for bias in biases if bias is not None).device, copy=True)
        torch.distributed.all_reduce(counts, group=group)
    for router, bias in zip(routers, biases, strict=True):
        if bias is not None:
            state = router._r1kernels
            update_router_bias(bias, counts[state.layer, : state.match.experts].to(bias.device), rate)


@contextmanager
def record_routing(model: nn.Module, weights: bool = False) -> Iterator[RoutingRecord]:
    """Record the expert choices of all forwards of a patched model in a ``with`` block (recomputation is left out).

    Args:
        weights: also what the chosen experts are weighed with.

    Yields:
        RoutingRecord: ``forward()`` for one plain forward, ``sequences(attention_mask)`` for a generation.
    """
    checks.boolean("weights", weights)
    routers = _routers(model)
    record = RoutingRecord(len(routers), weights)
    with _set(routers[0]._r1kernels.control, record=record):
        yield record


@contextmanager
def replay_routing(
    model: nn.Module, routing: RoutingRecord | Tensor, weights: Tensor | None = None
) -> Iterator[RoutingReplay]:
    """Route as recorded, with live weights, in the forwards of a ``with`` block.

    The expert choices are those of ``routing``, in its order; their weights, and so all gradients, come from the live logits, or,
    for a pass that scores, are the recorded ones, without gradient. Tokens without a record are routed live. Under activation
    checkpointing the backward belongs into the block too.

    Args:
        model: a patched model with as many routers as the recorded one.
        routing: a record of one forward, or (layers, T, K) int16 or int64, for example of ``pad_routing``, with -1
            in all K places of a token without a record. Each forward in the block must have these T tokens (those of the
            tree in a forward over a ``PrefixTree``).
        weights: (layers, T, K), such as ``record.forward_weights()``; None: live.

    Yields:
        RoutingReplay, whose ``agreement`` is the share of choices that the live router would have made too.
    """
    routers = _routers(model)
    recorded = routing.forward() if isinstance(routing, RoutingRecord) else routing
    shape = (len(routers), None, routers[0]._r1kernels.match.experts_per_token(routers[0]))
    checks.tensor("routing", recorded, dtypes=(torch.int16, torch.int64), shape=shape)
    if weights is not None:
        checks.tensor("weights", weights, dtypes=checks.FLOATS, shape=tuple(recorded.shape))
    replay = RoutingReplay(recorded, weights)
    with _set(routers[0]._r1kernels.control, replay=replay):
        yield replay


def router_names(model: nn.Module) -> list[str]:
    """The names of the routers of a patched model, in the order of a record's layers.

    Raises:
        ValueError: the model is not patched, or a router of it is not served.
    """
    routers = _routers(model)
    return [name for name, module in model.named_modules() if any(module is router for router in routers)]


def routes(model: nn.Module) -> bool:
    """Whether a model is patched and all its routers run on r1kernels: then their choices are counted, recorded and replayed."""
    states = [module._r1kernels for module in model.modules() if hasattr(module, "_r1kernels")]
    return bool(states) and all(isinstance(state, PatchedRouter) for state in states)


def _patched(model: nn.Module) -> list[Any]:
    """The modules that carry what ``patch`` knows of a mixture: its router, or its experts where the router is not served."""
    patched: list[Any] = [module for module in model.modules() if hasattr(module, "_r1kernels")]
    if not patched:
        raise ValueError("model: expected a model patched by r1kernels.integrations.transformers.patch")
    if any(module._r1kernels.control is not patched[0]._r1kernels.control for module in patched):
        raise ValueError("model: expected one patched model, got a module that holds several")
    return patched


def _routers(model: nn.Module) -> list[Any]:
    """The routers of a patched model, all of which ``route`` must serve: half a record would replay half a model."""
    patched = _patched(model)
    for module in patched:
        if isinstance(module._r1kernels, UnservedRouter):
            raise ValueError(
                f"model: expected a model all of whose routers are served, got one where {module._r1kernels.why}; see explain(model)"
            )
    return patched


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
