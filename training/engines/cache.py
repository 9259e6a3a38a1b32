"""Keys and values of the responses in flight, and the attention that reads them.

Responses form a tree of three levels: the head that all prompts begin with, the rest of each prompt, and each response.
A node's keys and values are computed and kept once, and its rows read them together. The model is transformers' own: it
runs over the tokens of many rows in one sequence of length T, and asks this file for its attention.

B rows in flight, N nodes of a level, L tokens, Hq and Hk heads of queries and keys, G = Hq / Hk, D and Dv their widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from r1kernels import DecodeLayout, autocast, decode_attention
from r1kernels.attention.reference import softmax

NAME = "r1kernels_rollout"  # of the attention in transformers' interface


class Rule(NamedTuple):
    """What a layer asks of its attention: factor of the scores, tokens it sees back to (None: all), soft cap of the scores,
    and a score for nothing, one per head (Hq,)."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Level:
    """Keys (N, Hk, L, D) and values (N, Hk, L, Dv) of every layer, with room for more nodes and tokens than there are."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._nodes = self._tokens = 0

    def make_room(self, nodes: int, tokens: int) -> None:
        """Lets the level hold `nodes` and `tokens`; what it holds stays. It at least doubles, so that few copies are made."""
        if nodes <= self._nodes and tokens <= self._tokens:
            return
        self._nodes = max(nodes, 2 * self._nodes) if nodes > self._nodes else self._nodes
        self._tokens = max(tokens, 2 * self._tokens) if tokens > self._tokens else self._tokens
        for layer, pair in self.layers.items():
            grown = self._new(*pair)
            for new, old in zip(grown, pair, strict=True):
                new[: old.shape[0], :, : old.shape[2]] = old
            self.layers[layer] = grown

    def _new(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # zeros, for a masked place is multiplied too
        return tuple(x.new_zeros((self._nodes, x.shape[1], self._tokens, x.shape[3])) for x in (key, value))  # type: ignore[return-value]

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `layer`, made like those of its first tokens, (.., Hk, .., D) and (.., Hk, .., Dv)."""
        if layer not in self.layers:
            self.layers[layer] = self._new(key, value)
        return self.layers[layer]

    def move(self, source: Sequence[int], target: Sequence[int], tokens: int) -> None:
        """Puts the nodes `source` where the nodes `target` are, their first `tokens` tokens."""
        for pair in self.layers.values():
            for held in pair:
                held[target, :, :tokens] = held[source, :, :tokens]


class Pass(Protocol):
    """One forward pass of the model."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """(T, Hq, Dv) from query (Hq, T, D), key (Hk, T, D) and value (Hk, T, Dv); keeps keys and values."""


@dataclass(frozen=True)
class Segment:
    """Tokens `first` to `end` of a prompt pass are node `node` of its level."""

    node: int
    first: int
    end: int


class PromptPass:
    """Reads whole nodes, each after the head (`head`: of its `offset` tokens) and before nothing else."""

    def __init__(
        self, level: Level, segments: Sequence[Segment], head: Level | None = None, offset: int = 0
    ) -> None:
        self.level, self.segments, self.head, self.offset = level, segments, head, offset

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        kept_key, kept_value = self.level.of(layer, key.unsqueeze(0), value.unsqueeze(0))
        out = query.new_empty((query.shape[1], query.shape[0], value.shape[-1]))
        for node, first, end in ((s.node, s.first, s.end) for s in self.segments):
            k, v = key[:, first:end], value[:, first:end]
            kept_key[node, :, : end - first] = k
            kept_value[node, :, : end - first] = v
            if self.head is not None:
                head_key, head_value = self.head.layers[layer]
                k = torch.cat((head_key[0, :, : self.offset], k), dim=1)
                v = torch.cat((head_value[0, :, : self.offset], v), dim=1)
            out[first:end] = _causal(query[:, first:end], k, v, rule).transpose(0, 1)
        return out


def _causal(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Attention of the last tokens of a text to all of it: query (Hq, n, D), key (Hk, m, D), value (Hk, m, Dv), m >= n."""
    n, m = query.shape[1], key.shape[1]
    plain = n == m and (rule.window is None or m <= rule.window)
    visible = None
    if not plain or rule.softcap is not None or rule.sinks is not None:
        behind = torch.arange(m - n, m, device=query.device).unsqueeze(1) - torch.arange(
            m, device=query.device
        )
        visible = (behind >= 0) & (behind < (rule.window or m))
    if rule.softcap is None and rule.sinks is None:
        found = torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(0),
            key.unsqueeze(0),
            value.unsqueeze(0),
            attn_mask=visible,
            is_causal=plain,
            scale=rule.scaling,
            enable_gqa=len(query) != len(key),
        )
        return found.squeeze(0)
    assert visible is not None
    grouped = query.unflatten(0, (len(key), -1))  # (Hk, G, n, D)
    scores = grouped @ key.unsqueeze(1).transpose(-1, -2)
    bias = torch.zeros(visible.shape, device=query.device).masked_fill(~visible, -torch.inf)
    sinks = None if rule.sinks is None else rule.sinks.view(len(key), -1, 1, 1)
    weights = softmax(scores, bias, rule.scaling, rule.softcap or 0.0, sinks)
    return (weights.to(value.dtype) @ value.unsqueeze(1)).flatten(0, 1)


class TokenPass:
    """Reads one token of each of B rows; it becomes token `layout.lengths[b]` of the row's own node."""

    def __init__(self, own: Level, shared: Sequence[Level], layout: DecodeLayout) -> None:
        """shared: what a row reads before its own node, as the layout says."""
        self.own, self.shared, self.layout = own, shared, layout

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        return decode_attention(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            self.own.of(layer, key.unsqueeze(0), value.unsqueeze(0)),
            self.layout,
            [level.layers[layer] for level in self.shared],
            scale=rule.scaling,
            window=rule.window,
            softcap=rule.softcap,
            sinks=rule.sinks,
        )


_current: ContextVar[Pass] = ContextVar("pass")
# of each layer, as a prompt pass was told
_windows: ContextVar[dict[int, int | None]] = ContextVar("windows")


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the layers of `model` ask the pass of `forward` for their attention."""
    # of a model of several parts, each of which has a configuration
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _window)
    model.set_attn_implementation(NAME)
    token = _windows.set({})
    try:
        yield
    finally:
        _windows.reset(token)
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def forward(
    model: PreTrainedModel, current: Pass, ids: Tensor, positions: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Logits (T, V), or those of the tokens `keep` alone, of tokens `ids` (T,) at `positions` (T,); inside of `attention`."""
    token = _current.set(current)
    # A mask of four dimensions is handed on as it is; to make one, transformers would wait for the device at every token.
    ready = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device)
    try:
        logits: Tensor = model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=ready if isinstance(current, TokenPass) else None,
            use_cache=False,
            logits_to_keep=0 if keep is None else keep,
        ).logits
    finally:
        _current.reset(token)
    return logits.squeeze(0)


def _window(*unused: Any, local_size: int | None = None, **unused_too: Any) -> Tensor | None:
    """transformers' mask function: the one thing that `_attend` must know of a mask, how far back it lets a token see."""
    return None if local_size is None else torch.tensor(local_size)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (1, Hq, T, D), key (1, Hk, T, D), value (1, Hk, T, Dv) -> (1, T, Hq, Dv)."""
    windows = _windows.get()
    if not isinstance(_current.get(), TokenPass):
        windows[module.layer_idx] = None if attention_mask is None else int(attention_mask)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scaling, windows[module.layer_idx], softcap, s_aux)
    # what is kept has one dtype: rotated under autocast, queries and keys of some models have another than values
    query, key, value = autocast.cast(query, key, value)
    return _current.get().attend(module.layer_idx, query[0], key[0], value[0], rule).unsqueeze(0), None
