"""The kernels of kept_rows.py on every backend: sets of similar size, padded by -inf, are rows for its row kernels.

A set of n entries becomes a row of the smallest power of two that is at least n and 16: at most twice the work, and a token's
bits depend on nothing but its set. How many sets there are of each width is read on the host.

N tokens, Z entries, n rows of w columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import kept_rows, token
from .kept import NO_SET
from .kept_rows import Sets
from .token import Rows, RowsBackwardCall, RowsCall, Upstream

WIDTHS = (0, *(16 << i for i in range(27)))


class Block(NamedTuple):
    """The sets of one width."""

    tokens: Tensor  # (n,)
    entries: Tensor  # (n, w), 0 where a row is padded
    valid: Tensor  # (n, w) bool

    def rows_of(self, logits: Tensor, sets: Sets) -> tuple[Tensor, Rows]:
        """(logits (1, n, w), what the row kernels are told about them)"""
        logits = torch.where(self.valid, logits[self.entries], -torch.inf)
        temperatures = None if sets.temperatures is None else sets.temperatures[self.tokens]
        rows = token.plain_rows(logits, sets.places[self.tokens], temperatures, sets.temperature, NO_SET)
        return logits.unsqueeze(0), rows


def _blocks(sets: Sets) -> Iterator[Block]:
    offsets = sets.offsets
    lengths = torch.where(sets.places == NO_SET, 0, offsets.diff())
    widths = torch.tensor(WIDTHS, device=offsets.device)
    kind = torch.bucketize(lengths, widths)
    order = kind.argsort(stable=True)
    counts = torch.bincount(kind, minlength=len(WIDTHS)).tolist()
    for width, tokens in zip(WIDTHS, order.split(counts), strict=True):
        if width == 0 or tokens.shape[0] == 0:
            continue
        column = torch.arange(width, device=offsets.device)
        valid = column < lengths[tokens].unsqueeze(1)
        entries = torch.where(valid, offsets[tokens].unsqueeze(1) + column, 0)
        yield Block(tokens, entries, valid)


def forward(backend: str, call: kept_rows.SetsCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = kept_rows.shapes(call)
    for result in results:
        result.zero_()
    for block in _blocks(call.sets):
        logits, rows = block.rows_of(call.logits, call.sets)
        found = token.FORWARD(backend, RowsCall(logits, rows, call.with_entropy, call.with_extra))
        if call.with_extra:
            _finish_extra(call.sets, block, logits[0], rows, *found[2:])
        for result, values in zip(results, found, strict=True):
            if result.numel():
                result[..., block.tokens] = values
    return results


def _finish_extra(sets: Sets, block: Block, logits: Tensor, rows: Rows, stats: Tensor, extra: Tensor) -> None:
    """The mean is over the kept logits alone; of equal logits the lowest id is top, as in the whole vocabulary."""
    taken = block.valid & (sets.tokens[block.entries] >= 0)
    temperature = rows.temperature if rows.temperatures is None else rows.temperatures
    extra[1] = torch.where(taken, logits, 0.0).sum(1) / taken.sum(1) / temperature
    ids = sets.ids[block.entries]
    largest = torch.where(logits == stats[0].unsqueeze(1), ids, torch.iinfo(ids.dtype).max).amin(1)
    extra[2] = largest == ids.gather(1, rows.targets.unsqueeze(1)).squeeze(1)


def backward(backend: str, call: kept_rows.SetsBackwardCall) -> Tensor:
    count = call.logits.shape[0]
    # padding goes to the place after the last entry
    grads = call.logits.new_zeros(count + 1)
    for block in _blocks(call.sets):
        logits, rows = block.rows_of(call.logits, call.sets)
        upstream = Upstream(
            call.logp[block.tokens],
            call.stats[:, block.tokens],
            None if call.grad_logp is None else call.grad_logp[block.tokens],
            None if call.grad_entropy is None else call.grad_entropy[block.tokens],
            None,
        )
        grad = token.BACKWARD(backend, RowsBackwardCall(logits, rows, upstream))
        grads[torch.where(block.valid, block.entries, count)] = grad[0]
    # an entry that takes no part stands in the row of its token, which may be NaN
    return grads[:count].masked_fill(call.sets.tokens < 0, 0.0)


for _backend in ("cpu", "cuda", "triton"):
    kept_rows.FORWARD.implement(_backend)(partial(forward, _backend))
    kept_rows.BACKWARD.implement(_backend)(partial(backward, _backend))
