"""Log-probs under a frozen head together with their slope d logp / d hidden: two products a tile instead of three.

Shapes: N tokens, H hidden, V vocabulary. With z_v the logit of column v, T the temperature, y the target and
J_v = d z_v / d hidden = logit_scale cap'_v W_v, where cap'_v = 1 - (z_v / softcap)^2, or 1 without a cap:

    slope = 1/T [ (1 - p_y) J_y - sum_{v != y} p_v J_v ],        1 - p_y = -expm1(logp)

so nothing cancels where p_y is close to 1. The sum runs over slabs of the vocabulary with p_v = e^((z_v - M) / T) relative
to the largest logit M so far: what was summed up before shrinks by e^((M_before - M) / T) when a larger one comes. The row
kernel of the backend gives the terms of a slab: it is told M, S' = 0 and logp = 0, which leaves the target out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import parts, tiles
from .token import Upstream

if TYPE_CHECKING:
    from .linear import FrozenCall


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
