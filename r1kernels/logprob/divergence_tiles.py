"""The kernels of linear_divergence, written once for all backends that have an engine (tiles.py).

Shapes: N tokens, H hidden, V vocabulary. Forward: some tokens at a time, all columns of both models side by side, since what an
id adds to the divergence needs the sums of both rows; the slopes then cost no further product where the backward takes them as they
are. Backward: tile by tile, as linear_tiles.py goes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import devices
from . import divergence, tiles
from .divergence_rows import Pair, TeacherRows, finish, gradient_over, sums
from .head import hidden_gradient_dtype

PAIR_BYTES = 512 << 20  # of the logits of both models, on a CPU
FEWEST = 64  # tokens of a block: with fewer both heads are read too often
UNIT = 64.0  # of slopes in float16, which holds nothing below 6e-8; slopes are seldom above some hundred


def implement(engine: tiles.Engine, key: str) -> None:
    """The kernels of linear_divergence for tensors of one dispatch key, by an engine."""
    divergence.FORWARD.implement(engine.backend, key)(partial(forward, engine))
    divergence.SUMS.implement(engine.backend, key)(partial(sums_of_slab, engine))
    divergence.BACKWARD.implement(engine.backend, key)(partial(backward, engine))


class Problems(NamedTuple):
    """The inputs of a call, the same for all tiles."""

    student: tiles.Problem
    teacher: tiles.Problem
    kind: int
    beta: float

    def raw_logits(self, block: slice, slab: slice, student: Tensor, teacher: Tensor) -> None:
        tiles.raw_logits(self.student, block, slab, student)
        tiles.raw_logits(self.teacher, block, slab, teacher)

    def side_by_side(self, block: slice, student: Tensor, teacher: Tensor) -> None:
        """The raw logits of a block in all columns."""
        for slab in self.student.tiling.slabs(self.student.weight.shape[0]):
            self.raw_logits(block, slab, student[:, slab], teacher[:, slab])

    def pair(self, block: slice, slab: slice, stats: Tensor, teacher_stats: Tensor) -> Pair:
        """What the row kernels are told about a tile; the sums are those of its tokens."""
        of_teacher = TeacherRows.of(tiles.rows_of(self.teacher, block, slab))
        rows = tiles.rows_of(self.student, block, slab)
        return Pair(rows, of_teacher, stats, teacher_stats, self.kind, self.beta)


def problems_of(
    engine: tiles.Engine,
    call: divergence.DivergenceCall | divergence.DivergenceSumsCall | divergence.DivergenceBackwardCall,
    tiling: tiles.Tiling,
) -> Problems:
    hidden, weight, of_teacher = call.teacher
    return Problems(
        tiles.Problem(engine, call.hidden, call.weight, call.rows, tiling),
        tiles.Problem(engine, hidden, weight, of_teacher.beside(call.rows), tiling),
        call.kind,
        call.beta,
    )


def tiling_of(engine: tiles.Engine, hidden: Tensor, vocabulary: int, chunk_size: int) -> tiles.Tiling:
    """The same in both directions, so that logits which are computed once more have the same bits: the sums of a row belong to
    them, and where one logit leads the slopes are made of what is left of it."""
    height = chunk_size or block_tokens(engine, hidden, vocabulary)
    return tiles.tiling_of(engine, hidden, vocabulary, height, False)


def forward(engine: tiles.Engine, call: divergence.DivergenceCall) -> tuple[Tensor, ...]:
    """What ``divergence.FORWARD`` gives."""
    hidden, weight, backend = call.hidden, call.weight, engine.backend
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    tiling = tiling_of(engine, hidden, vocabulary, call.chunk_size)
    problems = problems_of(engine, call, tiling)
    whole = slice(0, vocabulary)
    slope = engine.empty(hidden, divergence.slope_shape(call), torch.float32)
    beside = tiles.scratch(engine, hidden, tiling.tokens, vocabulary)
    own = slope if call.save_logits else tiles.scratch(engine, hidden, tiling.tokens, vocabulary)
    unit = None
    if weight.dtype == torch.float16:
        unit = torch.full((tiling.tokens,), UNIT, dtype=torch.float32, device=hidden.device)
    found = []
    for block in tiling.blocks(tokens):
        count = block.stop - block.start
        student, teacher = own[block if call.save_logits else slice(count)], beside[:count]
        problems.side_by_side(block, student, teacher)
        rows = [tiles.rows_of(problem, block, whole) for problem in problems[:2]]
        _, entropy, stats, _ = tiles.row_sums(problems.student, student, rows[0], call.with_entropy, False)
        _, _, teacher_stats, _ = tiles.row_sums(problems.teacher, teacher, rows[1], False, False)
        pair = problems.pair(block, whole, stats, teacher_stats)
        value, mean = finish(sums(backend, student, teacher, pair), stats)
        found.append((value, entropy, stats, teacher_stats, mean))
        if call.save_logits:
            gradient_over(backend, student, teacher, pair, mean, None)
        elif call.frozen:
            gradient_over(backend, student, teacher, pair, mean, None if unit is None else unit[:count])
            engine.add_product(tiles.factor(engine, student, weight.dtype), weight, slope[block], False)
    if call.frozen and unit is not None:
        slope /= UNIT
    return *(torch.cat(values, dim=-1) for values in zip(*found, strict=True)), slope


def sums_of_slab(engine: tiles.Engine, call: divergence.DivergenceSumsCall) -> Tensor:
    """What ``divergence.SUMS`` gives."""
    hidden, vocabulary = call.hidden, call.weight.shape[0]
    tiling = tiling_of(engine, hidden, vocabulary, call.chunk_size)
    problems, whole = problems_of(engine, call, tiling), slice(0, vocabulary)
    student, teacher = (tiles.scratch(engine, hidden, tiling.tokens, vocabulary) for _ in range(2))
    found = []
    for block in tiling.blocks(hidden.shape[0]):
        x, y = student[: block.stop - block.start], teacher[: block.stop - block.start]
        problems.side_by_side(block, x, y)
        pair = problems.pair(block, whole, call.stats[:, block], call.teacher_stats[:, block])
        found.append(sums(engine.backend, x, y, pair))
    return torch.cat(found, dim=-1)


def block_tokens(engine: tiles.Engine, hidden: Tensor, vocabulary: int) -> int:
    """As many tokens as the engine likes and the logits of both leave memory for, in blocks of equal size."""
    tokens = hidden.shape[0]
    room = devices.memory_budget(hidden, PAIR_BYTES) // (8 * vocabulary)
    blocks = -(-tokens // max(min(engine.tokens, room), FEWEST))
    return -(-tokens // max(blocks, 1)) or 1


def backward(engine: tiles.Engine, call: divergence.DivergenceBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, from the slopes of the logits where the forward kept them."""
    hidden, vocabulary = call.hidden, call.weight.shape[0]
    problems = problems_of(engine, call, tiling_of(engine, hidden, vocabulary, call.chunk_size))

    def gradient(block: slice, slab: slice) -> Tensor:
        student = tiles.tile_of(problems.student, block, slab, None)
        if call.slope is not None:
            torch.mul(call.slope[block, slab], call.grad[block].unsqueeze(1), out=student)
        else:
            teacher = tiles.tile_of(problems.teacher, block, slab, None)
            problems.raw_logits(block, slab, student, teacher)
            stats, teacher_stats, mean = (x[:, block] for x in (call.stats, call.teacher_stats, call.mean))
            pair = problems.pair(block, slab, stats, teacher_stats)
            gradient_over(engine.backend, student, teacher, pair, mean, call.grad[block])
        return tiles.factor(engine, student, hidden.dtype)

    needs = (call.need_hidden, call.need_weight, call.need_bias)
    return tiles.gradients(problems.student, needs, hidden_gradient_dtype(call), gradient)
