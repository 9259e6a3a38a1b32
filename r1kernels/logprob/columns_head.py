"""The logits of K ids a token from hidden states and the head, and the sums over all others: linear_logprobs of K targets per token.

N tokens, H hidden, V vocabulary, K ids per token. In the tile loop the ids take their logits out of each tile, which has -inf there
for the row kernel; backward their gradients are written into the one that the row kernel makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..op import OUTSIDE, Contiguous, Kernel, Size, Written, recorded
from . import events, sharded
from .events import Events
from .head import Gradients, gradient_shapes, gradients, saved_gradient_shapes, without_saved
from .kept_head import capped as capped
from .kept_head import slope as slope
from .token import Rows

if TYPE_CHECKING:
    from .linear import LinearCall


class HeadColumnsCall(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), of the same dtype
    rows: Rows  # for V columns; the targets do not matter
    ids: Contiguous  # (N, K) int64, each once in a row; below 0: padding
    with_entropy: bool
    chunk_size: Size
    save_logits: bool  # not where logits are ``finished``
    batch_invariant: bool
    shard: Annotated[sharded.Shard | None, OUTSIDE] = None  # that the head is


class HeadColumnsBackwardCall(NamedTuple):
    hidden: Tensor
    weight: Tensor
    rows: Rows
    ids: Contiguous
    chunk_size: Size
    stats: Tensor  # (3, N) of the rest
    grad_columns: Contiguous  # (N, K) float32, of the raw logits of the ids
    grad_rest: Contiguous  # (N,) float32, of y_rest
    grad_entropy: Contiguous | None  # (N,) float32, of H_R
    need_hidden: bool
    need_weight: bool
    need_bias: bool


class SavedHeadColumnsBackwardCall(NamedTuple):
    logits: Written  # those of the forward, which are overwritten
    backward: HeadColumnsBackwardCall


def _shapes(call: HeadColumnsCall) -> tuple[Tensor, Tensor, Tensor]:
    """The raw logits with bias of the ids (N, K), 0 where their rows of the head are not here; M, S', E' (3, N) of the rest;
    the raw logits (N, V) as the backward wants them if saved, else (0,)."""
    tokens, hidden = call.hidden.shape[0], call.hidden
    return (
        hidden.new_empty(call.ids.shape, dtype=torch.float32),
        hidden.new_empty((3, tokens), dtype=torch.float32),
        hidden.new_empty((tokens, call.weight.shape[0]) if call.save_logits else 0, dtype=torch.float32),
    )


FORWARD = Kernel("linear_columns", HeadColumnsCall, _shapes)
BACKWARD = Kernel("linear_columns", HeadColumnsBackwardCall, gradient_shapes, suffix="_backward")
BACKWARD_OF_SAVED = Kernel(
    "linear_columns", SavedHeadColumnsBackwardCall, saved_gradient_shapes, suffix="_backward_"
)


def _forward(backend: str, call: HeadColumnsCall) -> tuple[Tensor, ...]:
    columns, stats, logits = FORWARD(backend, call)
    if call.shard is not None:
        columns = sharded.sum_over_ranks_(columns, call.shard)
        stats = sharded.merged_stats(stats, call.shard, call.rows)
    return columns.masked_fill(call.ids >= call.rows.vocabulary, torch.nan), stats, logits


def _give(call: HeadColumnsCall, results: tuple[Tensor, ...]) -> Events:
    columns, stats, _ = results
    logits = capped(columns, call.rows)
    return events.of_sums(logits, stats, call.ids, events.divisor_of(call.rows), call.with_entropy)


def _save(call: HeadColumnsCall, results: tuple[Tensor, ...]) -> Any:
    (_, targets, temperatures), numbers = call.rows.apart()
    columns, stats, logits = results
    tensors = (targets, temperatures, call.ids, columns, stats, logits if call.save_logits else None)
    return tensors, (numbers, call.with_entropy, call.chunk_size, call.shard)


def _gradients(backend: str, inputs: Any, saved: Any, others: Any, grads: Any, needs: Any) -> Gradients:
    hidden, weight, bias = inputs
    targets, temperatures, ids, columns, stats, logits = saved
    numbers, with_entropy, chunk_size, shard = others
    rows = Rows.together((bias, targets, temperatures), numbers)
    of_logits, of_rest, of_entropy = events.gradients_of_sums(
        grads, ids, events.divisor_of(rows), with_entropy, torch.float32
    )
    of_columns = of_logits * slope(columns, rows)
    upstream = (of_columns, of_rest, of_entropy)
    call = HeadColumnsBackwardCall(hidden, weight, rows, ids, chunk_size, stats, *upstream, *needs)
    return gradients(backend, call, logits, shard, BACKWARD, BACKWARD_OF_SAVED)


_recorded = recorded(
    "linear_logprobs",
    _forward,
    differentiable=lambda call: (call.hidden, call.weight, call.rows.bias),
    save=_save,
    backward=_gradients,
    again=without_saved(_gradients),
    give=_give,
)


def finished(rows: Rows) -> bool:
    """Whether the tile loop makes logits of raw ones itself: -inf stays -inf under neither a cap nor a scale that is not above 0."""
    return bool(rows.softcap) or rows.logit_scale <= 0


def of_hidden(backend: str, call: LinearCall) -> Events:
    """The events of hidden states under a head, on the kernels of a backend; ``save_logits`` is decided."""
    assert call.ids is not None and call.save_logits is not None
    save_logits = call.save_logits and not finished(call.rows)
    options = (call.with_entropy, call.chunk_size, save_logits, call.batch_invariant, call.shard)
    with autocast.off(call.hidden):
        found = _recorded(backend, HeadColumnsCall(call.hidden, call.weight, call.rows, call.ids, *options))
    return Events(*found)


def logprobs(backend: str, call: LinearCall) -> tuple[Tensor, Tensor, Tensor]:
    """linear_logprobs of the ids: (log-probs (N, K), entropy (N,) or (0,), no statistics)."""
    return *events.logprobs(of_hidden(backend, call), torch.float32), call.hidden.new_empty((0, 0))
