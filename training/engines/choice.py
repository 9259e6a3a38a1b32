"""Choosing a token: keyed uniform numbers, and what top_p and top_k leave to choose from.

B rows, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from r1kernels import sample_tokens


def uniforms(keys: Sequence[int], count: int) -> Tensor:
    """(len(keys), count) float64 in [0, 1): number n of a key is SplitMix64's output at counter key + n * golden ratio."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = np.array(keys, dtype=np.uint64)[:, None] + counter
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


class Choice(NamedTuple):
    """tokens (B,) int64; logp (B,) float64, log-probs among what stays, 0 at temperature 0; kept (B, V) bool, what stays, None
    where nothing is left out."""

    tokens: Tensor
    logp: Tensor
    kept: Tensor | None


def choose_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Choice:
    """The token of each row at which the cumulated probability passes `uniform`, and its log-prob.

    Args:
        logits: (B, V).
        uniform: (B,) float64 in [0, 1).
        temperature: 0: the most probable token (the lowest index among equals).
        top_p: below 1, only the most probable tokens whose probabilities sum to at least top_p stay.
        top_k: above 0, only that many most probable tokens stay, and those as probable as the last of them; before top_p.

    Precision: that of `r1kernels.sample_tokens`; a token of probability 0 is never chosen. A row depends on itself alone, bitwise. No host
    sync on CUDA.
    """
    if temperature == 0:
        chosen = logits.argmax(dim=-1)
        return Choice(chosen, torch.zeros(chosen.shape, dtype=torch.float64, device=logits.device), None)
    kept = None
    if top_p < 1 or top_k > 0:
        scaled = logits.float()
        scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperature
        kept = truncated(scaled.exp(), top_p, top_k) > 0
        logits = logits.masked_fill(~kept, -torch.inf)
    return Choice(*sample_tokens(logits, uniform, temperature=temperature), kept)


def truncated(weights: Tensor, top_p: float, top_k: int) -> Tensor:
    """`weights` (B, V), at least 0, with 0 where top_k, and after it top_p, leaves a token out."""
    if 0 < top_k < weights.shape[-1]:
        last = weights.topk(top_k).values[:, -1:]
        weights = weights.masked_fill(weights < last, 0.0)
    return _likeliest(weights, top_p) if top_p < 1 else weights


def _likeliest(weights: Tensor, top_p: float) -> Tensor:
    """`weights` (B, V), at least 0, with 0 behind the largest ones that sum to top_p of their row; the first stays always."""
    total = weights.sum(dim=-1, dtype=torch.float64, keepdim=True)
    columns = None
    ranked = weights
    if weights.device.type == "cpu":
        # Weights below (1 - top_p) / V of the total sum to less than 1 - top_p of it: none stays, and the rest is soon sorted.
        rows, places = (weights >= 0.5 * (1 - top_p) / weights.shape[-1] * total).nonzero(as_tuple=True)
        counts = rows.bincount(minlength=len(weights))
        rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        columns = weights.new_zeros((len(weights), int(counts.max())), dtype=torch.int64)
        columns[rows, rank] = places
        ranked = weights.new_zeros(columns.shape)
        ranked[rows, rank] = weights[rows, places]
    ordered, order = ranked.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    kept = ordered.masked_fill((before >= top_p * total) & (before > 0), 0.0)
    if columns is not None:
        order = columns.gather(1, order)
    # Entries that stand for nothing have weight 0 and column 0: adding them changes nothing.
    return torch.zeros_like(weights).scatter_add(-1, order, kept)
