"""The kernels of linear_logprobs by tiles, written once for all backends that have an engine (tiles.py).

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import frozen, head, linear, parts, tiles
from .token import Upstream

Look = Callable[[slice, slice, Tensor], None]
"""Called with a block of tokens, a slab of the vocabulary and the tile of these, which it may change."""


def implement(engine: tiles.Engine, key: str) -> None:
    """The kernels of linear_logprobs for tensors of one dispatch key, by an engine."""
    backend = engine.backend
    linear.FORWARD.implement(backend, key)(partial(forward, engine))
    linear.BACKWARD.implement(backend, key)(partial(backward, engine))
    linear.BACKWARD_OF_SAVED.implement(backend, key)(partial(backward_of_saved, engine))
    frozen.KERNEL.implement(backend, key)(partial(frozen.forward, engine))


def forward(engine: tiles.Engine, call: linear.LinearCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, stats, extra) as the row kernels give them, and the raw logits (N, V) or (0,)."""
    shape = (call.hidden.shape[0], call.weight.shape[0]) if call.save_logits else (0,)
    logits = engine.empty(call.hidden, shape, torch.float32)
    if engine.forward is not None and (call.batch_invariant or not call.save_logits):
        results = engine.forward(call)
        if results is not None:
            # tiles beside it: whether they are kept must move no bit of a batch-invariant result
            if call.save_logits:
                _save_logits(tiles.problem_of(engine, call), logits)
            return *results, logits
    problem = tiles.problem_of(engine, call, call.batch_invariant)
    saved = logits if call.save_logits else None
    return *forward_by_tiles(problem, call.with_entropy, call.with_extra, saved), logits


def forward_by_tiles(
    problem: tiles.Problem,
    with_entropy: bool,
    with_extra: bool,
    saved: Tensor | None,
    look: Look | None = None,
) -> tiles.RowResults:
    """The raw logits are left in ``saved`` (N, V), if given; ``look`` sees those of each tile before they are summed up."""
    rows, tokens = problem.rows, problem.hidden.shape[0]
    vocabulary = problem.weight.shape[0]
    slabs, blocks = problem.tiling.slabs(vocabulary), problem.tiling.blocks(tokens)
    results = []
    for slab in slabs:
        of_slab = [
            _forward_tile(problem, block, slab, with_entropy, with_extra, saved, look) for block in blocks
        ]
        results.append(tuple(torch.cat(blocks, dim=-1) for blocks in zip(*of_slab, strict=True)))
    if len(slabs) == 1:
        return results[0]  # type: ignore[return-value]
    slab_parts = [parts.Part(chosen, stats, extra) for chosen, _, stats, extra in results]
    merged = parts.merge(slab_parts, [rows.first + slab.start for slab in slabs], vocabulary, rows)
    if rows.vocabulary != vocabulary:
        return (
            merged.chosen.float(),
            merged.chosen.new_empty(0).float(),
            merged.stats.float(),
            merged.extra.float(),
        )
    return parts.finish(merged, rows, with_entropy)


def _save_logits(problem: tiles.Problem, saved: Tensor) -> None:
    """All raw logits, into ``saved`` (N, V)."""
    for slab in problem.tiling.slabs(problem.weight.shape[0]):
        for block in problem.tiling.blocks(problem.hidden.shape[0]):
            tiles.raw_logits(problem, block, slab, saved[block, slab])


def _forward_tile(
    problem: tiles.Problem,
    block: slice,
    slab: slice,
    with_entropy: bool,
    with_extra: bool,
    saved: Tensor | None,
    look: Look | None,
) -> tiles.RowResults:
    tile = tiles.tile_of(problem, block, slab, saved)
    tiles.raw_logits(problem, block, slab, tile)
    if look is not None:
        look(block, slab, tile)
    return tiles.row_sums(problem, tile, tiles.rows_of(problem, block, slab), with_entropy, with_extra)


def backward(engine: tiles.Engine, call: linear.LinearBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """The logits are computed once more."""
    return _gradients(engine, call, None)


def backward_of_saved(engine: tiles.Engine, call: linear.SavedBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """From the logits of the forward, which are overwritten."""
    return _gradients(engine, call.backward, call.logits)


def _gradients(
    engine: tiles.Engine, call: linear.LinearBackwardCall, saved: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (call.need_hidden, call.need_weight, call.need_bias)
    dtype = head.hidden_gradient_dtype(call)
    return gradients(tiles.problem_of(engine, call), call.upstream, needs, dtype, saved)


def gradients(
    problem: tiles.Problem,
    upstream: Upstream,
    needs: tuple[bool, bool, bool],
    dtype: torch.dtype,
    saved: Tensor | None,
    look: Look | None = None,
    finish: Look | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden (in ``dtype``), weight and bias that are needed, from the logits in ``saved`` (N, V) or computed again.

    ``look`` sees the logits of each tile that are computed again, ``finish`` the gradient that the row kernel makes of a tile.
    """
    logp, stats, grad_logp, grad_entropy, sequences = upstream
    by_sequence, engine = sequences is not None, problem.engine

    def gradient(block: slice, slab: slice) -> Tensor:
        tile = tiles.tile_of(problem, block, slab, saved)
        if saved is None:
            tiles.raw_logits(problem, block, slab, tile)
            if look is not None:
                look(block, slab, tile)
        of_block = Upstream(
            logp[block],
            stats[:, block].contiguous(),
            grad_logp if by_sequence or grad_logp is None else grad_logp[block],
            grad_entropy if by_sequence or grad_entropy is None else grad_entropy[block],
            sequences[block] if sequences is not None else None,
        )
        rows = tiles.rows_of(problem, block, slab)
        found = engine.gradient(engine, tile, rows, problem.hidden.dtype, of_block)
        if finish is not None:
            finish(block, slab, found)
        return found

    return tiles.gradients(problem, needs, dtype, gradient)
