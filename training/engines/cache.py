"""Keys and values of the responses in flight, and the attention that reads them.

Responses form a tree of three levels: the head that all prompts begin with, the rest of each prompt, and each response.
A node's keys and values are computed and kept once, and its rows read them together. The model is transformers' own: it
runs over the tokens of many rows in one sequence of length T, and asks this file for its attention.

B rows in flight, N nodes of a level, W rows of a node at most, L tokens, Hq and Hk heads of queries and keys, G = Hq / Hk,
D and Dv their widths.
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
    return (_softmax(scores, bias, rule, sinks).to(value.dtype) @ value.unsqueeze(1)).flatten(0, 1)


def _softmax(scores: Tensor, bias: Tensor, rule: Rule, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension in float32: scores times the factor, their cap, a bias, and the score for nothing."""
    scores = scores.float() * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores + bias
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.to(scores).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


class Share:
    """Which node of a level each of B rows reads. width: W, rows of a node at most.

    place (B,): row -> node * W + its number among the node's rows; None where that is the row itself.
    """

    def __init__(self, nodes: Sequence[int], device: torch.device) -> None:
        """nodes: of every row."""
        rows_of: dict[int, int] = {}
        numbers = []
        for node in nodes:
            numbers.append(rows_of.get(node, 0))
            rows_of[node] = numbers[-1] + 1
        self.nodes = max(nodes) + 1
        self.width = max(numbers) + 1
        places = [node * self.width + number for node, number in zip(nodes, numbers, strict=True)]
        in_order = places == list(range(self.nodes * self.width))
        self.place = None if in_order else torch.tensor(places, device=device)

    def gather(self, rows: Tensor) -> Tensor:
        """(B, Hk, G, X) by row -> (N, Hk, W * G, X) by node; 0 where a node has fewer rows."""
        by_node = rows
        if self.place is not None:
            by_node = rows.new_zeros((self.nodes * self.width, *rows.shape[1:]))
            by_node[self.place] = rows
        if self.width == 1:
            return by_node
        return by_node.unflatten(0, (self.nodes, self.width)).transpose(1, 2).flatten(2, 3)

    def scatter(self, by_node: Tensor) -> Tensor:
        """(N, Hk, W * G, X) by node -> (B, Hk, G, X) by row: the inverse of `gather`."""
        rows = by_node
        if self.width > 1:
            rows = by_node.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.place is None else rows[self.place]


@dataclass
class Read:
    """What B rows read of a level: its first `tokens` tokens, of which row b sees those where `visible` (B, tokens), or all;
    position: of each token in the text of row b, (B, tokens) or (tokens,)."""

    level: Level
    share: Share
    tokens: int
    position: Tensor
    visible: Tensor | None


class TokenPass:
    """Reads one token of each of B rows, at their `positions` (B,); it becomes token `at` (B,) of the row's own node."""

    def __init__(self, reads: Sequence[Read], positions: Tensor, at: Tensor) -> None:
        """reads: the last one is the rows' own level, where row b is node b."""
        self.reads, self.positions, self.at = reads, positions, at
        self.rows = torch.arange(len(at), device=at.device)
        self._biases: dict[int | None, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        own_key, own_value = self.reads[-1].level.of(layer, key.unsqueeze(0), value.unsqueeze(0))
        own_key[self.rows, :, self.at] = key.transpose(0, 1)
        own_value[self.rows, :, self.at] = value.transpose(0, 1)
        grouped = query.transpose(0, 1).unflatten(1, (key.shape[0], -1))  # (B, Hk, G, D)
        scores = []
        for read in self.reads:
            keys = read.level.layers[layer][0][: read.share.nodes, :, : read.tokens]
            scores.append(read.share.scatter(read.share.gather(grouped) @ keys.transpose(-1, -2)))
        sinks = None if rule.sinks is None else rule.sinks.view(key.shape[0], -1, 1)
        weights = _softmax(torch.cat(scores, dim=-1), self._bias(rule.window), rule, sinks).to(value.dtype)
        out: Tensor | None = None
        for read, part in zip(
            self.reads, weights.split([read.tokens for read in self.reads], -1), strict=True
        ):
            values = read.level.layers[layer][1][: read.share.nodes, :, : read.tokens]
            found = read.share.scatter(read.share.gather(part) @ values)
            out = found if out is None else out + found
        assert out is not None
        return out.flatten(1, 2)

    def _bias(self, window: int | None) -> Tensor:
        """(B, 1, 1, all tokens read): 0 where a row sees a token, -inf elsewhere; the same in every layer of a window."""
        if window not in self._biases:
            parts = []
            for read in self.reads:
                seen = read.visible
                if window is not None:
                    near = self.positions.unsqueeze(1) - read.position < window
                    seen = near if seen is None else seen & near
                if seen is None:
                    seen = torch.ones((len(self.rows), read.tokens), dtype=torch.bool, device=self.at.device)
                parts.append(seen)
            hidden = ~torch.cat(parts, dim=1)
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
            self._biases[window] = bias[:, None, None]
        return self._biases[window]


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
    return _current.get().attend(module.layer_idx, query[0], key[0], value[0], rule).unsqueeze(0), None
