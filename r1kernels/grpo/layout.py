"""Padded (B, T) and packed (N,) tokens behind one small interface: sums over a sequence, and their way back to its tokens.

B sequences, T tokens of the longest (padded), N tokens in all (packed).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks

MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Layout(NamedTuple):
    """Which token belongs to which sequence, and which tokens count."""

    mask: Tensor
    """bool, (B, T) or (N,): the tokens that count."""
    segment: Tensor | None
    """int64 (N,): the sequence of each packed token; None where tokens are padded."""
    num_sequences: int

    def keep(self, values: Tensor, other: float = 0.0) -> Tensor:
        """``values`` with ``other`` in the places that do not count: NaN and inf there reach neither value nor gradient."""
        return torch.where(self.mask, values, other)

    def total(self, values: Tensor) -> Tensor:
        """(B,): the sum of ``values`` over the counted tokens of each sequence."""
        kept = self.keep(values)
        if self.segment is None:
            return kept.sum(-1)
        return kept.new_zeros(self.num_sequences).index_add(0, self.segment, kept)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """A value per sequence (B,), given to each of its tokens."""
        if self.segment is None:
            return per_sequence.unsqueeze(-1).expand(self.mask.shape)
        return per_sequence.index_select(0, self.segment)

    def to_tokens(self, values: Tensor) -> Tensor:
        """Values of shape (B, 1), one per sequence, or one per token, as one per token."""
        if values.shape == (self.num_sequences, 1):
            return self.spread(values.squeeze(1))
        return values

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """(B,): how many tokens of each sequence count."""
        return self.total(self.mask.to(dtype))


def num_sequences_of(mask: Tensor, cu_seqlens: Tensor | None) -> int:
    """B of ``mask``, (B, T) or, with ``cu_seqlens``, (N,), after a check of both."""
    checks.tensor("mask", mask, dtypes=MASKS)
    if cu_seqlens is None:
        if mask.ndim != 2:
            raise ValueError(
                "mask: expected shape (B, T), or (N,) together with cu_seqlens, "
                f"got {tuple(mask.shape)} without cu_seqlens"
            )
        return mask.shape[0]
    if mask.ndim != 1:
        raise ValueError(f"mask: expected shape (N,) together with cu_seqlens, got {tuple(mask.shape)}")
    checks.tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32, torch.int64), ndim=1, like=mask)
    num_sequences = cu_seqlens.shape[0] - 1
    if num_sequences < 0 or (num_sequences == 0 and mask.shape[0] > 0):
        raise ValueError(f"cu_seqlens: expected shape (B + 1,) with B >= 1, got {tuple(cu_seqlens.shape)}")
    if checks.values_visible(cu_seqlens):
        checks.boundaries("cu_seqlens", cu_seqlens, mask.shape[0])
    return num_sequences


def layout_of(mask: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """The layout of ``mask``, (B, T) or, with ``cu_seqlens``, (N,); both are checked."""
    num_sequences = num_sequences_of(mask, cu_seqlens)
    counted = mask != 0
    if cu_seqlens is None:
        return Layout(counted, None, num_sequences)
    ends = cu_seqlens[1:]
    segment = torch.searchsorted(
        ends, torch.arange(mask.shape[0], dtype=ends.dtype, device=ends.device), right=True
    )
    # Tokens behind the last boundary (an error that only the CPU sees) count nowhere and index nothing out of bounds.
    return Layout(
        counted & (segment < num_sequences), segment.clamp(max=max(num_sequences - 1, 0)), num_sequences
    )


def advantages_of(advantages: Tensor, num_sequences: int, like: Tensor) -> Tensor:
    """Checked advantages: (B,) as (B, 1), one per sequence; (B, 1) and those shaped like the tokens ``like`` as they are."""
    checks.tensor("advantages", advantages, dtypes=checks.FLOATS, like=like)
    if advantages.shape == (num_sequences,):
        return advantages.unsqueeze(1)
    if advantages.shape not in ((num_sequences, 1), like.shape):
        raise ValueError(
            f"advantages: expected shape ({num_sequences},), ({num_sequences}, 1) or {tuple(like.shape)}, "
            f"got {tuple(advantages.shape)}"
        )
    return advantages
