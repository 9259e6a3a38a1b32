"""The attention of a packed prefix tree in the models of transformers.

T packed tokens, H heads, D the size of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .. import autocast
from .prefix_attention import Call, Parts, attention, split
from .prefix_kernels import EAGER, Options, choose
from .prefix_tree import PrefixTree

NAME = "r1kernels_prefix_tree"
# where transformers' layers and torch's CheckpointWrapper keep the function that computes them again
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


class Running:
    """A forward over a tree: its parts, and what the attention layers asked for."""

    def __init__(self, tree: PrefixTree, device: torch.device) -> None:
        self.tree = tree
        self.multiplicity = tree.multiplicity.to(device)
        self.windows: list[int | None] = []  # of each attention layer so far
        self.kernels: dict[str, None] = {}
        self._longest = int(tree.position_ids.max()) + 1
        self._layouts: dict[tuple[int, torch.device], tuple[Parts, Tensor]] = {}

    def layout(self, window: int | None, device: torch.device) -> tuple[Parts, Tensor, int]:
        """(parts, positions, window) of a layer; 0: no window, or all sequences fit into it."""
        reach = 0 if window is None or window >= self._longest else window
        if (reach, device) not in self._layouts:
            parts = split(self.tree.nodes, reach, device)
            self._layouts[reach, device] = parts, self.tree.position_ids.to(device)
        return *self._layouts[reach, device], reach


class _Current(threading.local):
    running: Running | None = None


_current = _Current()


def current() -> Running | None:
    """The forward over a tree that runs in this thread."""
    return _current.running


@torch.compiler.disable
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **inputs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers for a packed tree: query (1, H, T, D) to (1, T, H, D of value).

    Raises:
        RuntimeError: no forward over a tree runs. ValueError: the layer asks for what this attention does not compute.
    """
    running, name = current(), type(module).__name__
    if running is None:
        raise RuntimeError(
            f"{name}: {NAME} attends within shared_prefix_states and shared_prefix_logprobs only"
        )
    if dropout:
        raise ValueError(
            f"{name}: expected attention without dropout, got dropout={dropout:g}; call model.eval()"
        )
    if attention_mask is not None or inputs.get("position_bias") is not None:
        raise ValueError(f"{name}: expected attention without a mask or bias of its own")
    if not (getattr(module, "is_causal", True) and inputs.get("is_causal", True) in (True, None)):
        raise ValueError(f"{name}: expected causal attention")
    tokens = running.tree.tokens
    if any(t.shape[0] != 1 or t.shape[2] != tokens for t in (query, key, value)):
        raise ValueError(
            f"{name}: expected queries, keys and values of {tokens} tokens, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    running.windows.append(sliding_window)
    parts, positions, window = running.layout(sliding_window, query.device)
    query, key, value = autocast.cast(query, key, value)
    options = Options(query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap)
    size = value.shape[-1]
    plain, masked = (choose(query, value, masked, options) for masked in (False, True))
    running.kernels |= {plain.name: None} | ({masked.name: None} if window else {})
    if plain is not EAGER and size < query.shape[-1]:
        value = nn.functional.pad(value, (0, query.shape[-1] - size))
    call = Call(parts, positions, window, options, plain, masked)
    with autocast.off(query):
        out = attention(query, key, value, s_aux, call)
    return out.transpose(1, 2)[..., :size], None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, lambda *arguments, **options: None)


@contextmanager
def attending(configs: Sequence[Any], running: Running) -> Iterator[None]:
    """Let the models of these configurations attend over a tree, in a ``with`` block in this thread."""
    before = [config._attn_implementation_internal for config in configs]
    outer = _current.running
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        _current.running = running
        yield
    finally:
        _current.running = outer
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


@contextmanager
def packed(model: Any, tree: PrefixTree) -> Iterator[Running]:
    """Let a model of transformers attend over a tree in a ``with`` block, and wherever its layers are computed again."""
    modules = list(model.modules())
    configs = {
        id(module.config): module.config
        for module in modules
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    }
    running = Running(tree, next(model.parameters()).device)
    checkpoints = [(m, name, vars(m)[name]) for m in modules for name in _CHECKPOINTS if name in vars(m)]

    def checkpointing(original: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            def run(*args: Any, **inputs: Any) -> Any:  # in the forward, and again in the backward
                with attending([*configs.values()], running):
                    return function(*args, **inputs)

            return original(run, *args, **options)

        return checkpoint

    try:
        for module, name, original in checkpoints:
            setattr(module, name, checkpointing(original))
        with attending([*configs.values()], running):
            yield running
    finally:
        for module, name, original in checkpoints:
            setattr(module, name, original)
