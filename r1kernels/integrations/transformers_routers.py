"""The routers of transformers that r1kernels serves, and what runs in their place.

T tokens of one forward, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import __version__ as transformers_version

from .. import backends, checks
from ..moe import Routing, route
from .routing_record import ExpertLoad, RoutingRecord, RoutingReplay
from .transformers_experts import register


@dataclass(frozen=True)
class Family:
    """How a family of router classes computes; ``options`` are the arguments of ``route``, read at every forward."""

    attributes: tuple[str, ...]
    options: Callable[[Any], dict[str, Any]]
    float32_logits: bool  # the linear layer runs in float32
    float32_weights: bool  # routing weights are not cast to the dtype of the logits


def _sigmoid_options(router: Any) -> dict[str, Any]:
    return {
        "score": "sigmoid",
        "bias": router.e_score_correction_bias,
        "n_group": router.num_group,
        "topk_group": router.topk_group,
        "normalize": router.norm_topk_prob,
        "scale": router.routed_scaling_factor,
    }


def _group_limited_options(router: Any) -> dict[str, Any]:
    checks.choice("topk_method", router.topk_method, ("greedy", "group_limited_greedy"))
    grouped = router.topk_method == "group_limited_greedy"
    return {
        "score": "softmax",
        "n_group": router.num_group if grouped else 1,
        "topk_group": router.topk_group if grouped else 1,
        "normalize": False,
        "scale": router.routed_scaling_factor,
    }


_SIGMOID = Family(
    ("e_score_correction_bias", "num_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
    _sigmoid_options,
    float32_logits=True,
    float32_weights=True,
)
_GROUP_LIMITED = Family(
    ("topk_method", "num_group", "topk_group", "routed_scaling_factor"),
    _group_limited_options,
    float32_logits=True,
    float32_weights=True,
)
_SOFTMAX = Family(
    ("norm_topk_prob",),
    lambda router: {"score": "softmax", "normalize": router.norm_topk_prob},
    float32_logits=False,
    float32_weights=False,
)
_SOFTMAX_NORMALIZED = Family(
    (), lambda router: {"score": "softmax", "normalize": True}, float32_logits=False, float32_weights=True
)
ROUTERS = {
    "DeepseekV2TopkRouter": _GROUP_LIMITED,
    "DeepseekV3TopkRouter": _SIGMOID,
    "Glm4MoeTopkRouter": _SIGMOID,
    "MixtralTopKRouter": _SOFTMAX_NORMALIZED,
    "OlmoeTopKRouter": _SOFTMAX,
    "Qwen2MoeTopKRouter": _SOFTMAX,
    "Qwen3MoeTopKRouter": _SOFTMAX,
}


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
    family: str  # a key of ROUTERS
    control: Control
    replayed: bool = False  # its last forward in training was a replay

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # a model that was loaded from a file names our experts
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


def _router_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of a patched router: (logits, weights, indices)."""
    state: PatchedRouter = self._r1kernels
    family = ROUTERS[state.family]
    logits = _logits(self, family, hidden_states)
    options = {"top_k": self.top_k, **family.options(self)}
    if _trial.running:
        routing = route(logits.float(), **options)
        return logits, _weights(family, routing, logits), routing.indices
    control, recomputing = state.control, _recomputing()
    if recomputing and state.replayed and control.replay is None:
        raise RuntimeError(
            "replay_routing: under activation checkpointing the backward must run inside the block of its forward"
        )
    indices = None
    if control.replay is not None:
        with torch.no_grad():
            live = route(logits.float(), **options).indices
        indices = control.replay.choose(state.layer, live, compare=not recomputing)
    routing = route(logits.float(), **options, indices=indices)
    if not recomputing:
        if self.training or torch.is_grad_enabled():
            state.replayed = control.replay is not None
        if control.record is not None:
            control.record.add(state.layer, routing.indices)
        if control.load is not None:
            control.load.add(state.layer, routing.indices, control.attention_mask)
    return logits, _weights(family, routing, logits), routing.indices


def _weights(family: Family, routing: Routing, logits: Tensor) -> Tensor:
    return routing.weights if family.float32_weights else routing.weights.to(logits.dtype)


def _logits(router: Any, family: Family, hidden_states: Tensor) -> Tensor:
    hidden_states = hidden_states.reshape(-1, router.hidden_dim)
    if not family.float32_logits:
        return F.linear(hidden_states, router.weight)
    # autocast would make bfloat16 of what the model asks for in float32
    with torch.autocast(hidden_states.device.type, enabled=False):
        return F.linear(hidden_states.float(), router.weight.float())


def _recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing computes it a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def install(router: Any, layer: int, control: Control) -> None:
    """Let a checked router run ``_router_forward``; deleting ``forward`` and ``_r1kernels`` undoes it."""
    router._r1kernels = PatchedRouter(layer, type(router).__name__, control)
    router.forward = partial(_router_forward, router)  # which copies and pickles with the router


def check_router(block: str, router: Any) -> None:
    """Check that the router of ``block`` is what ROUTERS takes it for, down to its weights on random tokens.

    Raises:
        ValueError: ``route`` does not compute what it asks for. RuntimeError: it is another router.
    """
    family, name = ROUTERS[type(router).__name__], type(router).__name__
    refusal = f"{name} of transformers {transformers_version} is not the router that r1kernels knows: "
    missing = [
        attribute
        for attribute in ("weight", "top_k", "hidden_dim", *family.attributes)
        if not hasattr(router, attribute)
    ]
    if missing:
        raise RuntimeError(refusal + f"it has no {', '.join(missing)}")
    arguments = list(inspect.signature(router.forward).parameters)
    if arguments != ["hidden_states"]:
        raise RuntimeError(refusal + f"its forward takes {', '.join(arguments)}")
    router = _whole(router)
    weight, generator = router.weight, torch.Generator().manual_seed(0)
    hidden = torch.randn(16, router.hidden_dim, generator=generator).to(weight)
    with torch.no_grad(), backends.use_backend("reference"):
        logits = weight.new_empty(16, weight.shape[0]) if weight.is_meta else _logits(router, family, hidden)
        try:
            ours = route(logits.float(), top_k=router.top_k, **family.options(router))
        except ValueError as error:
            raise ValueError(
                f"model: {block} ({name}) asks for what r1kernels.route does not compute: {error}"
            ) from error
        if weight.is_meta:
            return
        logits, weights, _ = router.forward(hidden)
    # sorted: transformers leaves the order of a token's experts open
    same = torch.allclose(
        weights.float().sort(dim=-1).values,
        ours.weights.to(weights.dtype).float().sort(dim=-1).values,
        rtol=1e-2 if weights.dtype != torch.float32 else 1e-4,
        equal_nan=True,
    )
    if logits.shape != (16, weight.shape[0]) or not same:
        raise RuntimeError(refusal + "it gives other weights")


def _whole(router: Any) -> Any:
    """The router, or where ``fully_shard`` holds its parameters a copy with the whole of them."""
    if not any(isinstance(parameter, DTensor) for parameter in router.parameters()):
        return router
    copied = copy.copy(router)
    copied._parameters = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in router.named_parameters()
    }
    return copied
