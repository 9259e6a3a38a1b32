"""Kept sets for tests, and log-probs over them in float64 by torch's log_softmax, set by set. N tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
Sets = list[list[int]]


def sets_around(targets: Tensor, lengths: list[int], vocabulary: int, seed: int = 0) -> Sets:
    """A set of each length in random order; one that is not empty holds the target of its token."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for target, length in zip(targets.flatten().tolist(), lengths, strict=True):
        ids = torch.randperm(vocabulary, generator=generator)[:length].tolist()
        if length and 0 <= target < vocabulary and target not in ids:
            ids[length // 2] = target
        sets.append(ids)
    return sets


def in_csr(sets: Sets, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """(ids, offsets)"""
    lengths = torch.tensor([0, *map(len, sets)], dtype=dtype)
    return torch.tensor([v for ids in sets for v in ids], dtype=dtype), lengths.cumsum(0).to(dtype)


def masked(logits: Tensor, sets: Sets) -> Tensor:
    """What eager PyTorch does: logits (N, V) with -inf outside the sets."""
    keep = torch.zeros(logits.shape, dtype=torch.bool)
    for row, ids in enumerate(sets):
        keep[row, ids or slice(None)] = True
    return logits.masked_fill(~keep, -torch.inf)


def of_sets(
    logits: Tensor, sets: Sets, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(log-prob, entropy, stats) of logits (N, V), one set after the other; 0 where ignored, no gradient outside a set."""
    rows = []
    for row, (ids, target) in enumerate(zip(sets, targets.flatten().tolist(), strict=True)):
        if target == IGNORED:
            rows.append(logits.new_zeros(5))
            continue
        ids = sorted(set(ids)) or list(range(logits.shape[1]))
        x = logits[row, ids] / (temperature[row] if isinstance(temperature, Tensor) else temperature)
        log_probs = x.log_softmax(-1)
        probs = log_probs.exp()
        logp = log_probs[ids.index(target)] if target in ids else logits.new_tensor(-torch.inf)
        entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum()
        squares, top = probs.square().sum().log(), x.new_tensor(float(ids[int(x.argmax())] == target))
        rows.append(torch.stack((logp, entropy, squares, x.mean(), top)))
    logp, entropy, squares, means, top = torch.stack(rows).unbind(1)
    return logp, entropy, {"log_sum_sq_probs": squares, "mean_logits": means, "is_top1": top > 0}
