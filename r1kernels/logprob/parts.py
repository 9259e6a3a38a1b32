"""Log-probs from parts of a vocabulary: the sums of slabs (or of the shards of a process group), merged in their order.

Shapes: N tokens, S parts. A part gives the logit of the target, z_y, where it holds it, and M, S', E' over its own columns
(reference.py), M and z_y before the division by the temperature T. With M the largest M_s, o its first owner and
w_s = e^((M_s - M) / T), 0 for a part that is all -inf:

    S' = S'_o + sum_{s != o} w_s (1 + S'_s)
    E' = sum_s w_s (E'_s + (M - M_s) / T (1 + S'_s))        since M - z = (M - M_s) + (M_s - z)

In float64, in the order of the parts, so that a token has the same bits in any company.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .token import Rows


class Part(NamedTuple):
    """What some columns of the vocabulary add to the log-probs of N tokens."""

    chosen: Tensor  # (N,) the logit of the target; NaN where other columns hold it
    stats: Tensor  # (3, N) M, S', E'
    extra: Tensor  # (3, N) as row_results has it, of these columns' own distribution, or (0, N)


def merge(parts: list[Part], starts: list[int], columns: int, rows: Rows) -> Part:
    """The part that all parts together make, in float64.

    parts: in the order of their columns; starts: the first column of each; columns: how many they hold together.
    """
    largest, others, spread = torch.stack([part.stats for part in parts]).double().unbind(1)
    top, owner = largest.max(0)
    distance = (top - largest) * _inverse_temperature(rows)
    weight = torch.where(largest == -torch.inf, 0.0, (-distance).exp())
    empty = largest == -torch.inf
    mass = torch.where(empty, others, weight * (1 + others))
    owned = torch.arange(len(parts), device=owner.device).unsqueeze(-1) == owner
    merged_others = _in_order(torch.where(owned, others, mass))
    merged_spread = _in_order(torch.where(weight == 0, 0.0, weight * (spread + distance * (1 + others))))
    # the part that holds the target; whatever is out of range is NaN in every part
    place = torch.zeros_like(rows.targets)
    for start in starts[1:]:
        place += rows.targets >= start
    chosen = torch.stack([part.chosen for part in parts]).gather(0, place.unsqueeze(0)).squeeze(0).double()
    stats = torch.stack((top, merged_others, merged_spread))
    if parts[0].extra.shape[0] == 0:
        return Part(chosen, stats, parts[0].extra)

    squares, means, is_top1 = torch.stack([part.extra for part in parts]).double().unbind(1)
    share = torch.where(empty, 0.0, weight * (1 + others)) / (1 + merged_others)
    squares = _in_order(torch.where(share == 0, 0.0, share.square() * squares.exp())).log()
    ends = [*starts[1:], starts[0] + columns]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    mean = _in_order(one * (size / columns) for one, size in zip(means, sizes, strict=True))
    first = is_top1.gather(0, owner.unsqueeze(0)).squeeze(0)
    return Part(chosen, stats, torch.stack((squares + 0 * merged_others, mean, first)))


def finish(
    part: Part, rows: Rows, with_entropy: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp (N,), entropy (N,) or (0,), stats (3, N), extra) from the part that is the whole vocabulary."""
    top, others, spread = part.stats.double().unbind(0)
    # all -inf: no distribution
    others = torch.where(top == -torch.inf, torch.nan, others)
    ignored = rows.targets == rows.ignore_index
    log_normaliser = others.log1p()
    logp = (part.chosen - top) * _inverse_temperature(rows) - log_normaliser
    entropy = logp.new_empty(0)
    if with_entropy:
        entropy = log_normaliser + spread / (1 + others)
        entropy = torch.where(logp.isnan(), torch.nan, entropy).masked_fill(ignored, 0.0)
    stats = torch.stack((top, others, spread)).masked_fill(ignored, 0.0)
    extra = part.extra.masked_fill(ignored, 0.0)
    return logp.masked_fill(ignored, 0.0).to(dtype), entropy.to(dtype), stats.to(dtype), extra.to(dtype)


def _inverse_temperature(rows: Rows) -> Tensor | float:
    return 1.0 / rows.temperature if rows.temperatures is None else 1.0 / rows.temperatures.double()


def _in_order(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    for value in others:
        first = first + value
    return first
