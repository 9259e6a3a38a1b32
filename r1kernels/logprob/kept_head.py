"""linear_logprobs with kept sets: a token costs the rows of the head that it kept, not all of them.

N tokens, H hidden, V vocabulary, Z entries of kept sets (kept.py). With r_e = hidden_n . weight_v + bias_v for the entry e = (n, v),
its logit z_e = cap(logit_scale r_e), cap(u) = softcap tanh(u / softcap), and g_e = dL / d r_e:

    dL / d hidden_n = sum_{e of n} g_e weight_v        dL / d weight_v = sum_{e of v} g_e hidden_n        dL / d bias_v = sum_{e of v} g_e

both sums in the order of ``Entries.order`` or of the set: no atomics. Of a sharded vocabulary each rank multiplies the entries that
it holds; r_e is the sum over the ranks, of which all but one give 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..op import Contiguous, Float32, Kernel, Size, recorded
from . import kept_rows, sharded
from .completions import EACH_TOKEN
from .head import gradient_shapes
from .kept import NO_SET, Entries, with_verdict
from .token import Rows

if TYPE_CHECKING:
    from .linear import LinearCall

LinearResults = tuple[Tensor, Tensor, Tensor]  # log-prob, entropy, extra of LinearCall


class ProductsCall(NamedTuple):
    hidden: Contiguous  # (N, H) float32, bfloat16 or float16
    weight: Contiguous  # (V, H), of the same dtype: the rows [first, first + V) of the head
    bias: Float32 | None  # (V,)
    ids: Tensor  # (Z,)
    tokens: Tensor  # Entries.tokens
    first: Size


class ProductsBackwardCall(NamedTuple):
    grad: Contiguous  # (Z,) float32; an entry at 0 takes no part, whatever its hidden states hold
    hidden: Contiguous
    weight: Contiguous
    ids: Tensor
    tokens: Tensor  # Entries.tokens
    offsets: Tensor  # (N + 1,)
    order: Tensor  # Entries.order
    first: Size
    # the head is some rows of a larger one: the gradient of hidden, a part of a sum, stays float32
    slab: bool
    need_hidden: bool
    need_weight: bool
    need_bias: bool


def shape(call: ProductsCall) -> Tensor:
    """r_e (Z,) float32; 0 where an entry takes no part, or its row of the head is not here."""
    return call.hidden.new_empty(call.ids.shape[0], dtype=torch.float32)


def backward_shapes(call: ProductsBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_shapes(call, torch.float32 if call.slab else call.hidden.dtype)


PRODUCTS = Kernel("kept_products", ProductsCall, shape)
PRODUCTS_BACKWARD = Kernel("kept_products", ProductsBackwardCall, backward_shapes, suffix="_backward")


class HeadCall(NamedTuple):
    """linear_logprobs of the tokens with a set; the others are 0."""

    hidden: Tensor
    weight: Tensor
    rows: Rows
    sets: kept_rows.Sets
    order: Tensor  # Entries.order
    with_entropy: bool
    with_extra: bool
    shard: sharded.Shard | None


def _forward(backend: str, call: HeadCall) -> tuple[Tensor, ...]:
    rows, sets = call.rows, call.sets
    products = ProductsCall(call.hidden, call.weight, rows.bias, sets.ids, sets.tokens, rows.first)
    raw = PRODUCTS(backend, products)
    if call.shard is not None:
        raw = sharded.sum_over_ranks_(raw, call.shard)
    logits = _logits(raw, sets.tokens, rows)
    results = kept_rows.FORWARD(backend, kept_rows.SetsCall(logits, sets, call.with_entropy, call.with_extra))
    return *results, raw


def _logits(raw: Tensor, tokens: Tensor, rows: Rows) -> Tensor:
    return capped(raw, rows).masked_fill(tokens < 0, -torch.inf)


def capped(raw: Tensor, rows: Rows) -> Tensor:
    """The logits of raw ones that have their bias."""
    logits = raw * rows.logit_scale
    return rows.softcap * torch.tanh(logits / rows.softcap) if rows.softcap else logits


def slope(raw: Tensor, rows: Rows) -> Tensor | float:
    """dz / dr; 1 - tanh^2 u = 4 e / (1 + e)^2 with e = e^-2|u| does not cancel where the cap is reached."""
    if not rows.softcap:
        return rows.logit_scale
    e = (-2 * (raw * rows.logit_scale / rows.softcap).abs()).exp()
    return rows.logit_scale * 4 * e / (1 + e).square()


def _save(call: HeadCall, results: tuple[Tensor, ...]) -> Any:
    (_, targets, _), numbers = call.rows.apart()
    logp, _, stats, _, raw = results
    tensors = (*call.sets[:-1], targets, call.order, logp, stats, raw)
    return tensors, (numbers, call.with_entropy, call.shard)


def _gradients(
    backend: str, inputs: Any, saved: Any, others: Any, grads: Any, needs: Any
) -> tuple[Tensor, ...]:
    hidden, weight, bias = inputs
    *of_sets, targets, order, logp, stats, raw = saved
    numbers, with_entropy, shard = others
    rows = Rows.together((bias, targets, of_sets[-1]), numbers)
    sets = kept_rows.Sets._make((*of_sets, rows.temperature))
    upstream = (grads[0], grads[1] if with_entropy else None)
    logits = _logits(raw, sets.tokens, rows)
    of_logits = kept_rows.BACKWARD(backend, kept_rows.SetsBackwardCall(logits, sets, logp, stats, *upstream))
    grad = of_logits * slope(raw, rows)
    of_head = (sets.ids, sets.tokens, sets.offsets, order, rows.first, shard is not None)
    call = ProductsBackwardCall(grad, hidden, weight, *of_head, *needs)
    for_hidden, for_weight, for_bias = PRODUCTS_BACKWARD(backend, call)
    if shard is not None and call.need_hidden:
        for_hidden = sharded.sum_over_ranks_(for_hidden, shard)
    return for_hidden, for_weight, for_bias


_recorded = recorded(
    "linear_logprobs",
    _forward,
    differentiable=lambda call: (call.hidden, call.weight, call.rows.bias),
    save=_save,
    backward=_gradients,
    give=lambda call, results: (results[0], results[1], results[3]),
    constant=(2,),
)


def on_kernels(backend: str, call: LinearCall, dense: Callable[[LinearCall], LinearResults]) -> LinearResults:
    """linear_logprobs with kept sets; ``dense`` serves the tokens that keep everything."""
    kept, rows = call.kept, call.rows
    assert kept is not None
    entries, sets = kept_rows.entries_of(backend, kept, rows)
    flags = (call.with_entropy, call.with_extra, call.shard)
    with autocast.off(call.hidden):
        results = _recorded(backend, HeadCall(call.hidden, call.weight, rows, sets, entries.order, *flags))
    results = with_verdict(entries.verdict, *results)
    if kept_rows.some_keep_all(entries.places != NO_SET, rows):
        results = _with_dense(call, entries, results, dense)
    logp, entropy, extra = results
    reduce = call.completions.reduced
    return reduce(logp), reduce(entropy) if call.with_entropy else entropy, extra


def _with_dense(
    call: LinearCall,
    entries: Entries,
    results: LinearResults,
    dense: Callable[[LinearCall], LinearResults],
) -> LinearResults:
    """``results``, where tokens that keep everything have those of the whole head."""
    rows, with_set = call.rows, entries.places != NO_SET
    call = call._replace(completions=EACH_TOKEN, kept=None)
    if torch.compiler.is_compiling():  # how many they are is not known: the head multiplies all tokens
        targets = torch.where(with_set, rows.ignore_index, rows.targets)
        of_all = dense(call._replace(rows=rows._replace(targets=targets)))
        logp, entropy, extra = (
            torch.where(with_set, mine, other) if mine.numel() else mine
            for mine, other in zip(results, of_all, strict=True)
        )
        return logp, entropy, extra
    some = (~with_set & (rows.targets != rows.ignore_index)).nonzero().squeeze(1)
    temperatures = None if rows.temperatures is None else rows.temperatures[some]
    of_some = dense(
        call._replace(
            hidden=call.hidden.index_select(0, some),
            rows=rows._replace(targets=rows.targets[some], temperatures=temperatures),
        )
    )
    logp, entropy, extra = (
        mine.index_copy(-1, some, other) if mine.numel() else mine
        for mine, other in zip(results, of_some, strict=True)
    )
    return logp, entropy, extra
