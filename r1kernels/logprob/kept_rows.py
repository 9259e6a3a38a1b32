"""Log-probs over kept sets: the softmax of each token's kept logits, and token_logprobs with kept sets.

N tokens, V vocabulary, Z entries of kept sets (kept.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..op import Contiguous, Kernel, recorded
from .completions import EACH_TOKEN
from .kept import ENTRIES, NO_SET, Entries, EntriesCall, Kept, with_verdict

if TYPE_CHECKING:
    from .token import Rows, TokenCall


class Sets(NamedTuple):
    """What every kernel is told about kept sets."""

    ids: Tensor  # (Z,)
    offsets: Tensor  # (N + 1,)
    tokens: Tensor  # Entries.tokens
    places: Tensor  # Entries.places
    temperatures: Tensor | None  # (N,) float32; None: ``temperature`` holds for all
    temperature: float


class SetsCall(NamedTuple):
    """The distribution of each token over its kept logits; numbers in results that have no set are 0."""

    logits: Tensor  # (Z,) float32; an entry that takes no part is -inf
    sets: Sets
    with_entropy: bool
    with_extra: bool


class SetsBackwardCall(NamedTuple):
    logits: Tensor
    sets: Sets
    logp: Tensor  # (N,) and (3, N), as the forward gives them
    stats: Tensor
    grad_logp: Contiguous | None  # (N,) float32
    grad_entropy: Contiguous | None


def shapes(call: SetsCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, stats, extra as the row kernels give them (token.row_results)."""
    tokens = call.sets.places.shape[0]
    return (
        call.logits.new_empty(tokens),
        call.logits.new_empty(tokens if call.with_entropy else 0),
        call.logits.new_empty((3, tokens)),
        call.logits.new_empty((3 if call.with_extra else 0, tokens)),
    )


def _backward_shape(call: SetsBackwardCall) -> Tensor:
    return torch.empty_like(call.logits)


FORWARD = Kernel("kept_rows", SetsCall, shapes)
BACKWARD = Kernel("kept_rows", SetsBackwardCall, _backward_shape, suffix="_backward")


def entries_of(backend: str, kept: Kept, rows: Rows) -> tuple[Entries, Sets]:
    call = EntriesCall(*kept, rows.targets, rows.ignore_index, rows.vocabulary)
    entries = Entries(*ENTRIES(backend, call))
    return entries, Sets(*kept, entries.tokens, entries.places, rows.temperatures, rows.temperature)


class ChosenCall(NamedTuple):
    """token_logprobs of the tokens with a set: log-prob, entropy, both (N,), 0 elsewhere."""

    logits: Tensor  # (B, T, V)
    sets: Sets
    with_entropy: bool


def _entry_of(logits: Tensor, sets: Sets) -> tuple[Tensor, Tensor, Tensor]:
    """The place of each entry in the logits (B, T, V); of one that takes no part, any."""
    tokens, length = sets.tokens.clamp(min=0), logits.shape[1]
    return tokens // length, tokens % length, torch.where(sets.tokens < 0, 0, sets.ids)


def _forward(backend: str, call: ChosenCall) -> tuple[Tensor, ...]:
    logits, sets, with_entropy = call
    logits = logits[_entry_of(logits, sets)].float().masked_fill(sets.tokens < 0, -torch.inf)
    return *FORWARD(backend, SetsCall(logits, sets, with_entropy, False)), logits


def _save(call: ChosenCall, results: tuple[Tensor, ...]) -> Any:
    logp, _, stats, _, logits = results
    *of_sets, temperature = call.sets
    return (*of_sets, logits, logp, stats), (temperature, call.with_entropy)


def _gradients(backend: str, inputs: Any, saved: Any, others: Any, grads: Any, needs: Any) -> list[Tensor]:
    *of_sets, logits, logp, stats = saved
    temperature, with_entropy = others
    sets = Sets._make((*of_sets, temperature))
    upstream = (grads[0], grads[1] if with_entropy else None)
    of_entries = BACKWARD(backend, SetsBackwardCall(logits, sets, logp, stats, *upstream))
    grad = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format)
    # an entry that takes no part adds 0 to another, so that the order does not matter
    grad.index_put_(_entry_of(grad, sets), of_entries.to(grad.dtype), accumulate=True)
    return [grad]


_recorded = recorded(
    "token_logprobs",
    _forward,
    differentiable=lambda call: (call.logits,),
    save=_save,
    backward=_gradients,
    give=lambda call, results: results[:2],
)


def on_kernels(
    backend: str, call: TokenCall, dense: Callable[[TokenCall], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """token_logprobs with kept sets; ``dense`` serves the tokens that keep everything."""
    kept, rows = call.kept, call.rows
    assert kept is not None
    entries, sets = entries_of(backend, kept, rows)
    logp, entropy = _recorded(backend, ChosenCall(call.logits, sets, call.with_entropy))
    logp, entropy, _ = with_verdict(entries.verdict, logp, entropy, logp.new_empty((0, 0)))
    with_set = entries.places != NO_SET
    if some_keep_all(with_set, rows):
        targets = torch.where(with_set, rows.ignore_index, rows.targets)
        all_of = call._replace(rows=rows._replace(targets=targets), completions=EACH_TOKEN, kept=None)
        other_logp, other_entropy = dense(all_of)
        logp = torch.where(with_set, logp, other_logp)
        entropy = torch.where(with_set, entropy, other_entropy) if call.with_entropy else entropy
    reduce = call.completions.reduced
    return reduce(logp), reduce(entropy) if call.with_entropy else entropy


def some_keep_all(with_set: Tensor, rows: Rows) -> bool:
    """Whether a token that counts keeps the whole vocabulary (a host sync on CUDA); in a compiled graph one may."""
    if torch.compiler.is_compiling():
        return True
    return bool(((rows.targets != rows.ignore_index) & ~with_set).any())
