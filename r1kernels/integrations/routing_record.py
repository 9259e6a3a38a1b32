"""Expert load, recorded routing and its replay, as plain tensors.

Routers of a model are numbered in module order ("layers", below). T tokens of one forward (batch times length, row-major),
B sequences, L positions, E experts, K experts per token.

A recorded choice is an int16 tensor of expert indices; NOT_RECORDED marks a token without one, which a replay
routes live.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..moe.reference import count_experts
from .prefix_tree import PrefixTree

NOT_RECORDED = -1


class ExpertLoad:
    """How many tokens each expert of each layer got: ``counts`` (layers, E) int64, added up over forwards."""

    def __init__(self, layers: int, experts: int) -> None:
        self.counts = torch.zeros(layers, experts, dtype=torch.int64)

    def add(self, layer: int, indices: Tensor, attention_mask: Tensor | None = None) -> None:
        """Count indices (T, K); with a mask of T integers in any shape, each token that often (0: padding)."""
        keep = None
        if attention_mask is not None:
            if attention_mask.numel() != indices.shape[0]:
                raise ValueError(
                    f"attention_mask: expected {indices.shape[0]} entries, one per token of the forward, "
                    f"got shape {tuple(attention_mask.shape)}"
                )
            keep = attention_mask.reshape(-1).to(indices.device, torch.int64)
        if self.counts.device != indices.device:
            self.counts = self.counts.to(indices.device)
        self.counts[layer] += count_experts(indices, self.counts.shape[1], keep)

    def max_over_mean(self) -> Tensor:
        """(layers,) float32: the load of the busiest expert relative to an even load; 1 is even, 0 means no tokens."""
        counts = self.counts.to(torch.float32)
        return counts.amax(dim=1) / counts.mean(dim=1).clamp(min=torch.finfo(torch.float32).tiny)


class RoutingRecord:
    """The expert choices of all forwards in a ``record_routing`` block.

    ``calls[layer]`` holds one (T, K) int16 tensor for each forward, in order: one for a plain forward, prefill and single
    tokens for a generation with a KV cache. ``weights`` holds likewise what the experts were weighed with, (T, K) in the dtype and the
    order of the experts, where that is recorded too.
    """

    def __init__(self, layers: int, weights: bool = False) -> None:
        self.calls: list[list[Tensor]] = [[] for _ in range(layers)]
        self.weights: list[list[Tensor]] | None = [[] for _ in range(layers)] if weights else None

    def add(self, layer: int, indices: Tensor, weights: Tensor | None = None) -> None:
        self.calls[layer].append(indices.detach().to(torch.int16))
        if self.weights is not None and weights is not None:
            self.weights[layer].append(weights.detach().clone())

    def forward(self) -> Tensor:
        """The choices of a single recorded forward, (layers, T, K); ValueError if it was not exactly one."""
        return _of_one_forward(self.calls)

    def forward_weights(self) -> Tensor:
        """The weights of a single recorded forward, (layers, T, K); ValueError if it was not exactly one, or without weights."""
        if self.weights is None:
            raise ValueError(
                "record: expected one of record_routing(model, weights=True), got one without weights"
            )
        return _of_one_forward(self.weights)

    def sequences(self, attention_mask: Tensor | PrefixTree) -> list[Tensor]:
        """The choices for each sequence without padding, from a generation with a KV cache or from one forward.

        The forwards must have fed the same B sequences in the same order, one stretch of positions after another, as
        ``model.generate`` does with sampling or greedy search (not with beams, and with prompts already
        repeated for several samples each). A call with B * n tokens holds n positions of each sequence.

        Args:
            attention_mask: (B, L), 1 for real tokens (prompt and response), 0 for padding on either side. L is the number of
                positions fed to the model, or more: the last sampled token of a generation was never fed, so the mask of
                the whole output has one column more, whose tokens have no record. Or the tree of one forward over a
                ``PrefixTree``.

        Returns:
            for each sequence (layers, tokens, K) int16, its recorded real tokens in order.
        """
        if isinstance(attention_mask, PrefixTree):
            tree, packed = attention_mask, self.forward()
            if packed.shape[1] != tree.tokens:
                raise ValueError(
                    f"attention_mask: expected a tree of {packed.shape[1]} tokens, got one of {tree.tokens}"
                )
            return [packed[:, path] for path in tree.paths(packed.device)]
        batch, length = _check_mask(attention_mask)
        sizes = [call.shape[0] for call in self.calls[0]]
        if not sizes:
            raise ValueError("record: expected at least one forward, got none")
        if any(size % batch for size in sizes):
            raise ValueError(
                f"attention_mask: expected a row for each recorded sequence, got {batch} for forwards of {sizes} tokens"
            )
        positions = torch.stack(
            [
                torch.cat([call.view(batch, -1, call.shape[-1]) for call in calls], dim=1)
                for calls in self.calls
            ]
        )
        recorded = positions.shape[2]
        if recorded > length:
            raise ValueError(f"attention_mask: expected at least {recorded} columns, got {length}")
        real = (attention_mask[:, :recorded] != 0).to(positions.device)
        return [positions[:, row, real[row]] for row in range(batch)]


def pad_routing(sequences: Sequence[Tensor], attention_mask: Tensor | PrefixTree) -> Tensor:
    """Lay recorded sequences out for a forward over a padded batch or a tree: the inverse of ``RoutingRecord.sequences``.

    Args:
        sequences: B tensors (layers, tokens, K), int16 or int64. The tokens of a sequence are its first real tokens.
        attention_mask: (B, L) of the batch to be replayed, 1 for real tokens, padding on either side. A sequence may have
            more real tokens than recorded ones (the last sampled token), never fewer. Or the tree of these sequences:
            a token that several share gets the experts that the first of them recorded for it.

    Returns:
        (layers, B * L, K), or (layers, tokens of the tree, K), int16 for ``replay_routing``, NOT_RECORDED at padding and at
        real tokens without record.
    """
    if isinstance(attention_mask, PrefixTree):
        return _pack_routing(sequences, attention_mask)
    batch, length = _check_mask(attention_mask)
    if len(sequences) != batch:
        raise ValueError(f"sequences: expected {batch}, one per row of attention_mask, got {len(sequences)}")
    layers, _, top_k = sequences[0].shape
    padded = sequences[0].new_full((layers, batch, length, top_k), NOT_RECORDED, dtype=torch.int16)
    for row, sequence in enumerate(sequences):
        real = (attention_mask[row] != 0).nonzero().squeeze(1).to(padded.device)
        tokens = sequence.shape[1]
        if tokens > real.shape[0]:
            raise ValueError(
                f"sequences: expected at most {real.shape[0]} tokens in sequence {row}, the real tokens of its "
                f"attention_mask, got {tokens}"
            )
        padded[:, row, real[:tokens]] = sequence.to(padded.device, torch.int16)
    return padded.flatten(1, 2)


def _pack_routing(sequences: Sequence[Tensor], tree: PrefixTree) -> Tensor:
    """``pad_routing`` over a tree."""
    if len(sequences) != len(tree.lengths):
        raise ValueError(
            f"sequences: expected {len(tree.lengths)}, one per sequence of the tree, got {len(sequences)}"
        )
    layers, _, top_k = sequences[0].shape
    packed = sequences[0].new_full((layers, tree.tokens, top_k), NOT_RECORDED, dtype=torch.int16)
    paths = tree.paths(packed.device)
    for row in reversed(range(len(paths))):  # the first of those that share a token comes last
        tokens = sequences[row].shape[1]
        if tokens > len(paths[row]):
            raise ValueError(
                f"sequences: expected at most {len(paths[row])} tokens in sequence {row}, the tokens of its path in the "
                f"tree, got {tokens}"
            )
        packed[:, paths[row][:tokens]] = sequences[row].to(packed.device, torch.int16)
    return packed


def _of_one_forward(calls: list[list[Tensor]]) -> Tensor:
    lengths = {len(each) for each in calls}
    if lengths != {1}:
        raise ValueError(
            f"record: expected one forward, got {sorted(lengths)} a layer; use sequences() and pad_routing() "
            "for a generation with a KV cache"
        )
    return torch.stack([each[0] for each in calls])


class RoutingReplay:
    """Recorded choices (layers, T, K) that stand in for the live ones, and how often both agree; where there are recorded weights,
    they stand in for the live ones too."""

    def __init__(self, recorded: Tensor, weights: Tensor | None = None) -> None:
        self.recorded = recorded
        self.weights = weights
        self._agreed = torch.zeros(recorded.shape[0], dtype=torch.int64, device=recorded.device)
        self._compared = torch.zeros_like(self._agreed)

    def choose(self, layer: int, live: Tensor, compare: bool) -> Tensor:
        """The indices (T, K) to route with, given the live choice: the recorded ones where there are any."""
        recorded = self.recorded[layer]
        if recorded.shape != live.shape:
            raise ValueError(
                f"replay_routing: expected recorded indices of shape {tuple(live.shape)} for layer {layer}, got "
                f"{tuple(recorded.shape)}"
            )
        recorded = recorded.to(live.device, torch.int64)
        known = (recorded != NOT_RECORDED).all(dim=1)
        if compare:
            same = (recorded.sort(dim=1).values == live.sort(dim=1).values).all(dim=1) & known
            self._agreed[layer] += same.sum().to(self._agreed.device)
            self._compared[layer] += known.sum().to(self._agreed.device)
        return torch.where(known.unsqueeze(1), recorded, live)

    def weigh(self, layer: int, live: Tensor) -> Tensor:
        """What to weigh the experts with, (T, K), given the live weights: the recorded ones, without gradient, where there are any."""
        if self.weights is None:
            return live
        known = (self.recorded[layer] != NOT_RECORDED).all(dim=1, keepdim=True)
        return torch.where(known.to(live.device), self.weights[layer].to(live), live)

    @property
    def agreement(self) -> float:
        """The share of recorded choices (over tokens and layers) whose live choice is the same set; NaN without any."""
        compared = int(self._compared.sum())
        return int(self._agreed.sum()) / compared if compared else float("nan")

    @property
    def agreements(self) -> list[float]:
        """The same share for each layer."""
        shares: list[float] = (self._agreed / self._compared).tolist()
        return shares


def _check_mask(attention_mask: Tensor) -> tuple[int, int]:
    if attention_mask.ndim != 2 or 0 in attention_mask.shape:
        raise ValueError(f"attention_mask: expected shape (B, L), got {tuple(attention_mask.shape)}")
    batch, length = attention_mask.shape
    return batch, length
