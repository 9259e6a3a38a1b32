"""Log-probs under a frozen head together with their slope d logp / d hidden: two products per tile instead of three.

Shapes: N tokens, H hidden, V vocabulary. With z_v the logit of column v, T the temperature, y the target and
J_v = d z_v / d hidden = logit_scale cap'_v W_v, where cap'_v = 1 - (z_v / softcap)^2, or 1 without a cap:

    slope = 1/T [ (1 - p_y) J_y - sum_{v != y} p_v J_v ],        1 - p_y = -expm1(logp)

so nothing cancels where p_y is close to 1. The sum runs over slabs of the vocabulary with p_v = e^((z_v - M) / T) relative
to the largest logit M so far: what was summed up before shrinks by e^((M_before - M) / T) when a larger one comes. The row
kernel of the backend gives the terms of a slab: it is told M, S' = 0 and logp = 0, which leaves the target out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..op import Kernel, Size, recorded
from . import parts, tiles
from .completions import Completions
from .token import Rows, Upstream

if TYPE_CHECKING:
    from .linear import LinearCall


class FrozenCall(NamedTuple):
    """Of the whole vocabulary, where hidden alone needs a gradient."""

    hidden: Tensor
    weight: Tensor
    rows: Rows
    with_extra: bool
    chunk_size: Size


def _shapes(call: FrozenCall) -> tuple[Tensor, Tensor, Tensor]:
    """logp (N,), extra (3, N) or (0, N), and the slope d logp / d hidden (N, H), in float32."""
    hidden, tokens = call.hidden, call.hidden.shape[0]
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty((3 if call.with_extra else 0, tokens), dtype=torch.float32),
        hidden.new_empty(hidden.shape, dtype=torch.float32),
    )


KERNEL = Kernel("linear_logprobs", FrozenCall, _shapes, suffix="_frozen")


def _forward(backend: str, call: LinearCall) -> tuple[Tensor, Tensor, Tensor]:
    return KERNEL(backend, FrozenCall(call.hidden, call.weight, call.rows, call.with_extra, call.chunk_size))


def _save(call: LinearCall, results: tuple[Tensor, ...]) -> Any:
    size, cu_seqlens, divisor = call.completions
    return (cu_seqlens, divisor, results[2]), size


def _give(call: LinearCall, results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    logp, extra, _ = results
    return call.completions.reduce(logp), logp.new_empty(0), extra


def _gradient(backend: str, inputs: Any, tensors: Any, others: Any, grads: Any, needs: Any) -> list[Tensor]:
    cu_seqlens, divisor, slope = tensors
    grad = Completions(others, cu_seqlens, divisor).of_tokens(grads[0], slope.shape[0])
    return [slope * grad.unsqueeze(1)]


logprobs = recorded(
    "linear_logprobs",
    _forward,
    differentiable=lambda call: (call.hidden,),
    save=_save,
    backward=_gradient,
    give=_give,
    constant=(1, 2),
)
"""Results of a ``LinearCall`` without entropy, differentiable in the hidden states alone."""


def forward(engine: tiles.Engine, call: FrozenCall) -> tuple[Tensor, Tensor, Tensor]:
    """(logp (N,), extra (3, N) or (0, N), slope (N, H)), all float32; slope is 0 for a token that is ignored."""
    problem, hidden = tiles.problem_of(engine, call), call.hidden
    slope = problem.engine.empty(hidden, hidden.shape, torch.float32)
    blocks = problem.tiling.blocks(hidden.shape[0])
    results = [_block(problem, block, call.with_extra, slope[block]) for block in blocks]
    logp, extra = (torch.cat(values, dim=-1) for values in zip(*results, strict=True))
    return logp, extra, slope


def _block(problem: tiles.Problem, block: slice, with_extra: bool, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, extra) of a block of tokens, whose slope is written."""
    engine, weight = problem.engine, problem.weight
    vocabulary = weight.shape[0]
    slabs = problem.tiling.slabs(vocabulary)
    rows = tiles.rows_of(problem, block, slice(0, vocabulary))
    inverse = 1.0 / (rows.temperature if rows.temperatures is None else rows.temperatures)
    zeros = slope.new_zeros(slope.shape[0])
    unit = torch.ones_like(zeros)
    if weight.dtype == torch.float16:
        unit = tiles.unit_of((inverse * rows.logit_scale + zeros).abs(), exponent=14)
    found, top = [], zeros
    for slab in slabs:
        tile, of_slab = tiles.tile_of(problem, block, slab, None), tiles.rows_of(problem, block, slab)
        tiles.raw_logits(problem, block, slab, tile)
        logp, _, stats, extra = tiles.row_sums(problem, tile, of_slab, False, with_extra)
        found.append(parts.Part(logp, stats, extra))
        # of -inf alone every term is 0, whatever they are relative to
        largest = stats[0].clamp(min=torch.finfo(torch.float32).min)
        if slab is not slabs[0]:
            largest = torch.maximum(top, largest)
            slope *= ((top - largest) * inverse).exp().unsqueeze(1)
        relative_to = torch.stack((largest, zeros, zeros))
        upstream = Upstream(zeros, relative_to, unit, None, None)
        terms = engine.gradient(engine, tile, of_slab, weight.dtype, upstream)
        engine.add_product(terms, weight[slab], slope, slab is not slabs[0])
        top = largest
    if len(slabs) > 1:
        merged = parts.merge(found, [slab.start for slab in slabs], vocabulary, rows)
        logp, _, stats, extra = parts.finish(merged, rows, with_entropy=False)
    slope *= (((top - stats[0]) * inverse).exp() / (1 + stats[1]) / unit).unsqueeze(1)
    at_target = -logp.expm1() * inverse * rows.logit_scale
    place = rows.targets.clamp(0, vocabulary - 1)
    of_target = weight[place].float()
    if rows.softcap:
        raw = (problem.hidden[block].float() * of_target).sum(1)
        raw = raw if rows.bias is None else raw + rows.bias[place]
        # 1 - tanh^2 u = 4 e / (1 + e)^2 with e = e^-2|u|, which does not cancel where the cap is reached
        e = (-2 * (raw * rows.logit_scale / rows.softcap).abs()).exp()
        at_target = at_target * 4 * e / (1 + e).square()
    slope.addcmul_(of_target, at_target.unsqueeze(1))
    slope.masked_fill_((rows.targets == rows.ignore_index).unsqueeze(1), 0.0)
    return logp, extra
