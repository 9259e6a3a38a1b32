"""What the rows of a decoding step read, the same in every layer of a model.

B rows, N nodes, W rows of a node at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks


class SharedPrefix(NamedTuple):
    """The part of each row's text that nodes of shared keys and values hold; ``SharedPrefix.of`` makes it.

    lengths (B,) int64: tokens of its node that row b sees. place (B,) int64: node * width + the number of row b among the rows of its
    node; None: that is b. width: W. nodes: N. longest: of the lengths.
    """

    lengths: Tensor
    place: Tensor | None
    width: int
    nodes: int
    longest: int

    @classmethod
    def of(
        cls, nodes: Sequence[int], lengths: Sequence[int], device: torch.device | str | None = None
    ) -> SharedPrefix:
        """Row b reads the first ``lengths[b]`` tokens of node ``nodes[b]``."""
        if len(nodes) != len(lengths):
            raise ValueError(f"lengths: expected one for each of {len(nodes)} rows, got {len(lengths)}")
        if min(nodes, default=0) < 0 or min(lengths, default=0) < 0:
            raise ValueError("nodes, lengths: expected numbers of at least 0")
        rows_of: dict[int, int] = {}
        numbers = []
        for node in nodes:
            numbers.append(rows_of.get(node, 0))
            rows_of[node] = numbers[-1] + 1
        width = max(rows_of.values(), default=1)
        places = [node * width + number for node, number in zip(nodes, numbers, strict=True)]
        in_order = places == list(range(len(rows_of) * width))
        return cls(
            torch.tensor(lengths, dtype=torch.int64, device=device),
            None if in_order else torch.tensor(places, dtype=torch.int64, device=device),
            width,
            max(nodes, default=-1) + 1,
            max(lengths, default=0),
        )


class DecodeLayout:
    """A step in which each of B rows reads a new token, behind ``lengths[b]`` tokens in the row's own cache and, before those, its
    part of each of ``prefixes``, in their order."""

    def __init__(self, lengths: Tensor, longest: int, prefixes: Sequence[SharedPrefix] = ()) -> None:
        """lengths: (B,) int64. longest: none of them is above it."""
        checks.tensor("lengths", lengths, dtypes=(torch.int64,), ndim=1)
        checks.integer("longest", longest, 0)
        for prefix in prefixes:
            checks.tensor("prefixes", prefix.lengths, shape=lengths.shape, like=lengths)
        self.lengths, self.longest, self.prefixes = lengths.contiguous(), longest, tuple(prefixes)
        # as the kernel takes them; an empty place stands for None
        self.prefix_lengths = [prefix.lengths for prefix in prefixes]
        self.places = [lengths.new_empty(0) if p.place is None else p.place for p in prefixes]
        self.widths = [prefix.width for prefix in prefixes]
        self._bias: dict[int, Tensor] = {}

    def check(self) -> None:
        """Raise IndexError at the first length outside of [0, longest], where values may be looked at."""
        if checks.values_visible(self.lengths):
            checks.in_range("layout.lengths", self.lengths, 0, self.longest + 1)

    def bias(self, window: int) -> Tensor:
        """(B, tokens): 0 where a row sees a token, -inf elsewhere; of the longest part of each prefix and of the cache.

        window: 0 for none. It is kept for the next layer.
        """
        if window not in self._bias:
            lengths = [*self.prefix_lengths, self.lengths + 1]
            text, begin = torch.stack(lengths).sum(dim=0), torch.zeros_like(self.lengths)
            hidden = []
            for length, most in zip(lengths, self.tokens, strict=True):
                place = torch.arange(most, device=length.device)
                unseen = place >= length[:, None]
                if window:
                    unseen |= place < (text - window - begin)[:, None]
                hidden.append(unseen)
                begin = begin + length
            every = torch.cat(hidden, dim=1)
            self._bias[window] = torch.zeros(every.shape, device=every.device).masked_fill(every, -torch.inf)
        return self._bias[window]

    @property
    def tokens(self) -> list[int]:
        """The most tokens that a row sees of each prefix, and of the cache."""
        return [*(prefix.longest for prefix in self.prefixes), self.longest + 1]
