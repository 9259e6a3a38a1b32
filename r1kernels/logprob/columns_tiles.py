"""The kernels of columns.py and columns_head.py on every backend: the row kernels on logits with -inf in the columns of the ids.

n tokens x v columns of a tile, N tokens, V vocabulary, K ids per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import columns, columns_head, cpu, cuda, events, head, linear_tiles, tiles, token, triton_linear
from .token import Rows, Upstream


class Places(NamedTuple):
    """Where the ids of n tokens stand among v columns.

    The column of an id that is not here is that of another of its token, or 0 where none is: a write there repeats what is
    written for the other, or what stands there. So no order of writes matters, and nothing waits for a GPU.
    """

    at: Tensor  # (n, K)
    source: Tensor  # (n, K) the entry that is written there
    here: Tensor  # (n, K) bool
    some: Tensor  # (n, 1) bool

    @classmethod
    def of(cls, ids: Tensor, first: int, width: int) -> Places:
        """Among the columns [first, first + width)."""
        place = ids - first
        here = (ids >= 0) & (place >= 0) & (place < width)
        last, entry = torch.where(here, place, -1).max(-1, keepdim=True)
        own = torch.arange(ids.shape[-1], device=ids.device)
        at = torch.where(here, place, last.clamp(min=0))
        return cls(at, torch.where(here, own, entry), here, last >= 0)

    def take_(self, tile: Tensor) -> Tensor:
        """The values of the tile (n, v) at the ids (n, K), where -inf takes their place; anything for an id that is not here."""
        found = tile.gather(-1, self.at)
        self.put_(tile, tile.new_full((), -torch.inf).expand(self.at.shape))
        return found

    def put_(self, tile: Tensor, values: Tensor) -> None:
        """Write the values (n, K) to the tile."""
        values = values.to(tile.dtype).gather(-1, self.source)
        values = torch.where(self.some, values, tile[:, :1])
        # on a CPU torch scatters floats of 16 bits by way of a float32 copy of the whole tile
        if tile.element_size() == 2:
            tile, values = tile.view(torch.int16), values.view(torch.int16)
        tile.scatter_(-1, self.at, values)


def rest_rows(ids: Tensor, rows: Rows) -> Rows:
    """The rows of the rest, whose target is one past the vocabulary: in no column, so that results are parts (token.Rows)."""
    vocabulary = rows.vocabulary
    targets = torch.where(events.has_ids(ids), vocabulary, events.PADDING)
    return rows._replace(targets=targets, ignore_index=events.PADDING, vocabulary=vocabulary + 1)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """The caller in a compiled graph has not looked."""
    if ids.is_cpu and bool((ids >= vocabulary).any()):
        raise RuntimeError(f"ids: expected values in [0, {vocabulary})")


def upstream_of(stats: Tensor, grad_rest: Tensor, grad_entropy: Tensor | None) -> Upstream:
    """What the row kernels are told: d y_rest = -d logp of a target that is in no column."""
    # of a rest that is all -inf every term is 0, whatever it is relative to
    largest = stats[:1].clamp(min=torch.finfo(torch.float32).min)
    return Upstream(
        torch.zeros_like(grad_rest), torch.cat((largest, stats[1:])), -grad_rest, grad_entropy, None
    )


def forward(engine: tiles.Engine, call: columns.ColumnsCall) -> tuple[Tensor, Tensor]:
    logits, ids, vocabulary = call.logits, call.ids, call.logits.shape[-1]
    check_ids(ids, vocabulary)
    rows = rest_rows(ids, token.plain_rows(logits, ids, call.temperatures, call.temperature, events.PADDING))
    found = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    stats = torch.zeros((3, ids.shape[0]), dtype=torch.float32, device=ids.device)
    height = max(engine.tile_bytes // (vocabulary * logits.element_size()), 1)
    scratch = engine.empty(logits, (min(height, ids.shape[0]), vocabulary), logits.dtype)
    for block, piece in _pieces(logits, height):
        tile = scratch[: piece.shape[0]].copy_(piece)
        places = Places.of(ids[block], 0, vocabulary)
        taken = places.take_(tile)
        found[block] = torch.where(places.here, taken.float(), 0.0)
        call_of_piece = token.RowsCall(tile.unsqueeze(0), _part(rows, block), call.with_entropy, False)
        stats[:, block] = token.FORWARD(engine.backend, call_of_piece)[2]
    return found.masked_fill(ids >= vocabulary, torch.nan), stats


def backward(engine: tiles.Engine, call: columns.ColumnsBackwardCall) -> Tensor:
    logits, ids, vocabulary = call.logits, call.ids, call.logits.shape[-1]
    rows = rest_rows(ids, token.plain_rows(logits, ids, call.temperatures, call.temperature, events.PADDING))
    upstream = upstream_of(call.stats, call.grad_rest, call.grad_entropy)
    # a column of the rest has the gradient that it would have without those of the ids, whose places are written after it
    grad: Tensor = token.BACKWARD(engine.backend, token.RowsBackwardCall(logits, rows, upstream))
    Places.of(ids, 0, vocabulary).put_(grad.view(-1, vocabulary), call.grad_columns)
    return grad


def _pieces(logits: Tensor, height: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits (B, T, V) as (rows of N, at most ``height`` of them (n, V)), no piece a copy."""
    batch, length, vocabulary = logits.shape
    if batch == 1 or length == 1 or logits.stride(0) == length * logits.stride(1):
        logits = logits.view(1, batch * length, vocabulary)
        batch, length = 1, batch * length
    for sequence in range(batch):
        for start in range(0, length, height):
            piece = logits[sequence, start : start + height]
            begin = sequence * length + start
            yield slice(begin, begin + piece.shape[0]), piece


def _part(rows: Rows, block: slice) -> Rows:
    temperatures = None if rows.temperatures is None else rows.temperatures[block]
    return rows._replace(targets=rows.targets[block], temperatures=temperatures)


class Tiles:
    """The tiles of a call on hidden states, as the row kernels read them: -inf in the columns of the ids.

    Where logits are ``finished`` here, the row kernels are told of no bias, scale and cap.
    """

    def __init__(
        self,
        engine: tiles.Engine,
        call: columns_head.HeadColumnsCall | columns_head.HeadColumnsBackwardCall,
        batch_invariant: bool,
    ) -> None:
        self.rows, self.ids = rest_rows(call.ids, call.rows), call.ids
        rows = self.rows
        if columns_head.finished(rows):
            rows = rows._replace(bias=None, logit_scale=1.0, softcap=0.0)
        hidden, weight = call.hidden, call.weight
        tiling = tiles.tiling_of(engine, hidden, weight.shape[0], call.chunk_size, batch_invariant)
        self.problem = tiles.Problem(engine, hidden, weight, rows, tiling)

    def places(self, block: slice, slab: slice) -> Places:
        return Places.of(self.ids[block], self.rows.first + slab.start, slab.stop - slab.start)

    def take_(self, block: slice, slab: slice, tile: Tensor) -> tuple[Tensor, Tensor | float]:
        """The raw logits with bias of the ids of a block (n, K); d logit / d raw logit, (n, v) or a number, where they are finished here."""
        places, bias = self.places(block, slab), self.rows.bias
        slope: Tensor | float = 1.0
        raw = tile.gather(-1, places.at)
        if bias is not None:
            raw = raw + bias[slab][places.at]
        if columns_head.finished(self.rows):
            with_bias = tile if bias is None else tile + bias[slab]
            slope = columns_head.slope(with_bias, self.rows)
            # 0 times NaN, which the hidden states of an ignored token may hold, is NaN
            if isinstance(slope, Tensor):
                slope.masked_fill_(~events.has_ids(self.ids[block]).unsqueeze(1), 0.0)
            tile.copy_(columns_head.capped(with_bias, self.rows))
        places.take_(tile)
        return torch.where(places.here, raw, 0.0), slope


def head_forward(engine: tiles.Engine, call: columns_head.HeadColumnsCall) -> tuple[Tensor, Tensor, Tensor]:
    shape = (call.hidden.shape[0], call.weight.shape[0]) if call.save_logits else (0,)
    saved = engine.empty(call.hidden, shape, torch.float32)
    check_ids(call.ids, call.rows.vocabulary)
    of_call = Tiles(engine, call, call.batch_invariant)
    found = torch.zeros(call.ids.shape, dtype=torch.float32, device=call.ids.device)

    def look(block: slice, slab: slice, tile: Tensor) -> None:
        raw, _ = of_call.take_(block, slab, tile)
        found[block] += raw  # 0 in all slabs but one

    _, _, stats, _ = linear_tiles.forward_by_tiles(
        of_call.problem, call.with_entropy, False, saved if call.save_logits else None, look
    )
    return found, stats, saved


def head_backward(
    engine: tiles.Engine, call: columns_head.HeadColumnsBackwardCall, saved: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """From the logits that the forward has saved, which are overwritten, or from those that are computed once more."""
    of_call = Tiles(engine, call, False)
    slope: Tensor | float = 1.0

    def look(block: slice, slab: slice, tile: Tensor) -> None:
        nonlocal slope
        _, slope = of_call.take_(block, slab, tile)

    def finish(block: slice, slab: slice, gradient: Tensor) -> None:
        if isinstance(slope, Tensor) or slope != 1.0:
            gradient *= slope
        of_call.places(block, slab).put_(gradient, call.grad_columns[block])

    upstream = upstream_of(call.stats, call.grad_rest, call.grad_entropy)
    needs = (call.need_hidden, call.need_weight, call.need_bias)
    dtype = head.hidden_gradient_dtype(call)
    return linear_tiles.gradients(of_call.problem, upstream, needs, dtype, saved, look, finish)


def head_backward_of_saved(
    engine: tiles.Engine, call: columns_head.SavedHeadColumnsBackwardCall
) -> tuple[Tensor, Tensor, Tensor]:
    return head_backward(engine, call.backward, call.logits)


def implement(engine: tiles.Engine, key: str) -> None:
    """The kernels for tensors of one dispatch key, by an engine."""
    backend = engine.backend
    columns.FORWARD.implement(backend, key)(partial(forward, engine))
    columns.BACKWARD.implement(backend, key)(partial(backward, engine))
    columns_head.FORWARD.implement(backend, key)(partial(head_forward, engine))
    columns_head.BACKWARD.implement(backend, key)(partial(head_backward, engine))
    columns_head.BACKWARD_OF_SAVED.implement(backend, key)(partial(head_backward_of_saved, engine))


implement(cpu.ENGINE, "CPU")
implement(cuda.ENGINE, "CUDA")
implement(triton_linear.ENGINE, "CUDA")
implement(triton_linear.INTERPRETED_ENGINE, "CPU")
