"""Tiles of the linear log-prob ops: what all kernel backends and loops over them share.

Shapes: N tokens, H hidden, V vocabulary (the rows of the head), a tile of n tokens x v columns of the (N, V) logits. A tile
of raw logits is a GEMM; the row op of the backend turns it into sums (forward) or into its own gradient, in place
(backward); two GEMMs then add that gradient to those of the hidden states and of the head. Logits and sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import token
from .token import Rows, Upstream

if TYPE_CHECKING:
    from . import frozen, linear

RowResults = tuple[Tensor, Tensor, Tensor, Tensor]  # logp, entropy, stats, extra as the row kernels give them


def gradient_over_tile(
    engine: Engine, tile: Tensor, rows: Rows, dtype: torch.dtype, upstream: Upstream
) -> Tensor:
    """The gradient of the raw logits, in float32, over them."""
    token.BACKWARD_OVER(engine.backend, token.RowsBackwardOverCall(tile.unsqueeze(0), rows, upstream))
    return tile


class Engine(NamedTuple):
    """What a backend gives to the tile loop."""

    backend: str
    # logits(hidden (n, H), weight (v, H), out (n, v) float32): out = hidden @ weight.T
    logits: Callable[[Tensor, Tensor, Tensor], None]
    # add_product(a (m, k) float32, b (k, H), out (m, H) float32, accumulate): out = a @ b, or out += a @ b
    add_product: Callable[[Tensor, Tensor, Tensor, bool], None]
    # empty(like, shape, dtype): a tensor on the device of ``like`` for scratch or results, not initialised
    empty: Callable[[Tensor, Sequence[int], torch.dtype], Tensor]
    tile_bytes: int
    tokens: int  # n where the caller gives none
    # for batch invariance: the width of all slabs, and invariant_tokens(dtype), how many rows every GEMM has. A library
    # GEMM of few rows differs in the last bits from one of many, two of one shape agree; 0: the GEMM is invariant itself
    invariant_columns: int
    invariant_tokens: Callable[[torch.dtype], int]
    # gradient(engine, tile (n, v), rows, dtype of the inputs, upstream): the gradient of the raw logits as add_product wants
    # it, over the tile or in a tensor of its own
    gradient: Callable[[Engine, Tensor, Rows, torch.dtype, Upstream], Tensor] = gradient_over_tile
    # forward(call): (logp, entropy, stats, extra) from a kernel that writes no tile, or None where it does not serve the
    # call; None: there is no such kernel
    forward: Callable[[linear.LinearCall], RowResults | None] | None = None
    one_dtype: bool = False  # add_product takes a in the dtype of b


def scratch(
    engine: Engine, like: Tensor, tokens: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(tokens, columns), not initialised, whose rows begin on cache lines, as vectors and GEMMs like them."""
    return engine.empty(like, (tokens, -(-columns // 64) * 64), dtype)[:, :columns]


def factor(engine: Engine, tile: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tile as add_product takes it beside a matrix of this dtype."""
    return tile.to(dtype) if engine.one_dtype else tile


def unit_of(largest: Tensor, exponent: int) -> Tensor:
    """The power of two to take for the upstream gradient in place of 1, where the ``largest`` gradient of a logit is known.

    For float16, to which engines may round the gradient of a tile, and which holds nothing below 6e-8 and above 65504: the largest
    one is then near 2^exponent.
    """
    return torch.ldexp(torch.ones_like(largest), exponent - largest.frexp().exponent)


class Tiling(NamedTuple):
    """The extent of a tile."""

    tokens: int
    columns: int
    # every GEMM has exactly so many rows, the last one padded by zeros; 0: as many as the tile
    gemm_tokens: int

    def blocks(self, tokens: int) -> list[slice]:
        return [slice(i, min(i + self.tokens, tokens)) for i in range(0, max(tokens, 1), self.tokens)]

    def slabs(self, vocabulary: int) -> list[slice]:
        return [slice(i, min(i + self.columns, vocabulary)) for i in range(0, vocabulary, self.columns)]


class Problem(NamedTuple):
    """The inputs of a call, the same for all tiles."""

    engine: Engine
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    rows: Rows  # of all tokens and columns
    tiling: Tiling


def problem_of(
    engine: Engine,
    call: linear.LinearCall | linear.LinearBackwardCall | frozen.FrozenCall,
    batch_invariant: bool = False,
) -> Problem:
    tiling = tiling_of(engine, call.hidden, call.weight.shape[0], call.chunk_size, batch_invariant)
    return Problem(engine, call.hidden, call.weight, call.rows, tiling)


def tiling_of(
    engine: Engine, hidden: Tensor, vocabulary: int, chunk_size: int, batch_invariant: bool
) -> Tiling:
    """chunk_size 0: chosen here, from the shape and the memory that a tile may take."""
    height = max(min(chunk_size or engine.tokens, hidden.shape[0]), 1)
    widest = engine.invariant_columns if batch_invariant else max(engine.tile_bytes // (4 * height), 256)
    slabs = -(-vocabulary // widest)
    # slabs of equal width, a multiple of what vectors and tiles of matrices like
    width = -(-vocabulary // slabs)
    gemm_tokens = engine.invariant_tokens(hidden.dtype) if batch_invariant else 0
    return Tiling(height, min(-(-width // 64) * 64, vocabulary), gemm_tokens)


class Sum:
    """The gradient of hidden or of weight, a sum of products over tiles, in float32; rounded once at the end."""

    def __init__(
        self,
        problem: Problem,
        like: Tensor,
        needed: bool,
        pieces: list[slice],
        complete: bool,
        dtype: torch.dtype,
    ) -> None:
        """complete: a piece gets all its products one after the other, so that its accumulator serves the next one."""
        self.engine, self.needed, self.like = problem.engine, needed, like
        self.result = problem.engine.empty(like, like.shape if needed else (0,), dtype)
        self.started: set[int] = set()
        self.reused = complete
        if not needed:
            return
        if dtype == torch.float32:
            self.reused, self.sums = False, self.result
        else:
            size = (
                max((piece.stop - piece.start for piece in pieces), default=0) if complete else like.shape[0]
            )
            self.sums = self.engine.empty(like, (size, like.shape[1]), torch.float32)

    def add(self, piece: slice, a: Tensor, b: Tensor, last: bool) -> None:
        if not self.needed:
            return
        sums = self.sums[: piece.stop - piece.start] if self.reused else self.sums[piece]
        self.engine.add_product(a, b, sums, piece.start in self.started)
        self.started.add(piece.start)
        if last and self.sums is not self.result:
            self.result[piece] = sums


def row_sums(problem: Problem, tile: Tensor, rows: Rows, with_entropy: bool, with_extra: bool) -> RowResults:
    """What the row kernel of the backend makes of a tile of raw logits."""
    call = token.RowsCall(tile.unsqueeze(0), rows, with_entropy, with_extra)
    return token.FORWARD(problem.engine.backend, call)


def tile_of(problem: Problem, block: slice, slab: slice, saved: Tensor | None) -> Tensor:
    """Where the logits of a tile stand."""
    if saved is not None:
        return saved[block, slab]
    return scratch(problem.engine, problem.hidden, block.stop - block.start, slab.stop - slab.start)


def rows_of(problem: Problem, block: slice, slab: slice) -> Rows:
    rows = problem.rows
    return rows._replace(
        bias=None if rows.bias is None else rows.bias[slab],
        targets=rows.targets[block],
        temperatures=None if rows.temperatures is None else rows.temperatures[block],
        first=rows.first + slab.start,
    )


def counted(problem: Problem, block: slice) -> Tensor:
    """The hidden states of a block, 0 where the token is ignored: its gradient is 0, but 0 times NaN is NaN."""
    ignored = problem.rows.targets[block] == problem.rows.ignore_index
    return problem.hidden[block].masked_fill(ignored.unsqueeze(1), 0.0)


def raw_logits(problem: Problem, block: slice, slab: slice, tile: Tensor) -> None:
    """The raw logits of a tile."""
    engine, hidden, weight = problem.engine, problem.hidden[block], problem.weight[slab]
    rows = problem.tiling.gemm_tokens
    if rows == 0:
        engine.logits(hidden, weight, tile)
        return
    # the same shape and the same alignment every time
    padded = hidden.new_zeros(rows, hidden.shape[1])
    full = scratch(engine, hidden, rows, weight.shape[0])
    for some, place in zip(hidden.split(rows), tile.split(rows), strict=True):
        padded[: some.shape[0]] = some
        engine.logits(padded, weight, full)
        place.copy_(full[: some.shape[0]])


def gradients(
    problem: Problem,
    needs: tuple[bool, bool, bool],
    hidden_dtype: torch.dtype,
    gradient: Callable[[slice, slice], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and, in float32, bias; (0,) where not needed.

    gradient(block, slab): that of the raw logits of a tile, as add_product takes it. Tiles are taken slab by slab of the
    vocabulary, or block by block of the tokens. Slab by slab, a slab of dW is complete at once and dX (N, H) is accumulated;
    block by block it is the other way round. Inputs of 16 bits need a float32 accumulator for what is not complete at once, so
    the order follows from what needs a gradient and from which one is smaller.
    """
    need_hidden, need_weight, need_bias = needs
    hidden, weight = problem.hidden, problem.weight
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    slabs, blocks = problem.tiling.slabs(vocabulary), problem.tiling.blocks(tokens)
    by_slab = need_weight and (not need_hidden or tokens <= vocabulary)
    grad_hidden = Sum(problem, hidden, need_hidden, blocks, complete=not by_slab, dtype=hidden_dtype)
    grad_weight = Sum(problem, weight, need_weight, slabs, complete=by_slab, dtype=weight.dtype)
    grad_bias = hidden.new_zeros(vocabulary if need_bias else 0, dtype=torch.float32)
    for block, slab in _in_turn(blocks, slabs, by_slab):
        tile = gradient(block, slab)
        grad_hidden.add(block, tile, weight[slab], last=slab is slabs[-1])
        if need_weight:
            grad_weight.add(slab, tile.t(), counted(problem, block), last=block is blocks[-1])
        if need_bias:
            grad_bias[slab] += tile.sum(0, dtype=torch.float32)
    return grad_hidden.result, grad_weight.result, grad_bias


def _in_turn(blocks: list[slice], slabs: list[slice], by_slab: bool) -> Iterator[tuple[slice, slice]]:
    if by_slab:
        yield from ((block, slab) for slab in slabs for block in blocks)
    else:
        yield from ((block, slab) for block in blocks for slab in slabs)


def one_pass(
    problem: Problem,
    with_entropy: bool,
    slopes: Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy) and the gradients of hidden, weight and bias, all float32 or (0,), of a loss whose slope is known per token.

    slopes(block, logp, entropy) -> (dL/dlogp, dL/dentropy or None) of a block of tokens, called in turn. The logits of a
    block, all columns at once, are computed once and overwritten by their gradient. Tiles are blocks: the columns of the
    tiling do not matter.
    """
    engine, hidden, weight = problem.engine, problem.hidden, problem.weight
    blocks, whole = problem.tiling.blocks(hidden.shape[0]), slice(0, weight.shape[0])
    grad_hidden = Sum(problem, hidden, needs[0], blocks, complete=True, dtype=torch.float32)
    grad_weight = Sum(problem, weight, needs[1], [whole], complete=False, dtype=torch.float32)
    grad_bias = hidden.new_zeros(whole.stop if needs[2] else 0, dtype=torch.float32)
    tiles = scratch(engine, hidden, min(problem.tiling.tokens, hidden.shape[0]), whole.stop)
    values = []
    for block in blocks:
        tile, rows = tiles[: block.stop - block.start], rows_of(problem, block, whole)
        raw_logits(problem, block, whole, tile)
        logp, entropy, stats, _ = row_sums(problem, tile, rows, with_entropy, False)
        upstream = Upstream(logp, stats, *slopes(block, logp, entropy), None)
        gradient = engine.gradient(engine, tile, rows, hidden.dtype, upstream)
        grad_hidden.add(block, gradient, weight, last=True)
        if needs[1]:
            grad_weight.add(whole, gradient.t(), counted(problem, block), last=block is blocks[-1])
        if needs[2]:
            grad_bias += gradient.sum(0, dtype=torch.float32)
        values.append((logp, entropy))
    logp, entropy = map(torch.cat, zip(*values, strict=True))
    return logp, entropy, grad_hidden.result, grad_weight.result, grad_bias
