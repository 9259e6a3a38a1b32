"""The logits of K ids per token, and the sums over all others: token_logprobs of K targets per token, and what events.py needs.

B, T leading dimensions, N = B * T tokens, V vocabulary, K ids per token. The row kernels sum over the rest: they get the logits with
-inf in the columns of the ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..op import Contiguous, Float32, Kernel, recorded
from . import columns_reference, events, reference
from .events import Events

if TYPE_CHECKING:
    from .token import Rows, TokenCall


class ColumnsCall(NamedTuple):
    logits: Tensor  # (B, T, V); any strides on B and T, stride 1 on V
    ids: Contiguous  # (N, K) int64, each once in a row; below 0: padding
    temperatures: Float32 | None  # (N,); None: ``temperature`` holds for all
    temperature: float
    with_entropy: bool


class ColumnsBackwardCall(NamedTuple):
    logits: Tensor
    ids: Contiguous
    temperatures: Float32 | None
    temperature: float
    stats: Tensor  # (3, N), as the forward gives them
    grad_columns: Contiguous  # (N, K) float32, of the logits of the ids
    grad_rest: Contiguous  # (N,) float32, of y_rest
    grad_entropy: Contiguous | None  # (N,) float32, of H_R


def _shapes(call: ColumnsCall) -> tuple[Tensor, Tensor]:
    """The logits of the ids (N, K), NaN for one out of range, 0 for padding; M, S', E' of the rest (3, N), as row_results has them."""
    tokens, count = call.ids.shape
    return (
        call.logits.new_empty((tokens, count), dtype=torch.float32),
        call.logits.new_empty((3, tokens), dtype=torch.float32),
    )


def _backward_shape(call: ColumnsBackwardCall) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype."""
    return call.logits.new_empty(call.logits.shape)


FORWARD = Kernel("columns", ColumnsCall, _shapes)
BACKWARD = Kernel("columns", ColumnsBackwardCall, _backward_shape, suffix="_backward")


def _save(call: ColumnsCall, results: tuple[Tensor, Tensor]) -> Any:
    return (call.ids, call.temperatures, results[1]), (call.temperature, call.with_entropy)


def _give(call: ColumnsCall, results: tuple[Tensor, Tensor]) -> Events:
    return events.of_sums(*results, call.ids, events.divisor_of(call), call.with_entropy)


def _gradients(backend: str, inputs: Any, saved: Any, others: Any, grads: Any, needs: Any) -> list[Tensor]:
    (logits,), (ids, temperatures, stats), (temperature, with_entropy) = inputs, saved, others
    divisor = temperature if temperatures is None else temperatures.double()
    upstream = events.gradients_of_sums(grads, ids, divisor, with_entropy, torch.float32)
    call = ColumnsBackwardCall(logits, ids, temperatures, temperature, stats, *upstream)
    return [BACKWARD(backend, call)]


_recorded = recorded(
    "token_logprobs",
    FORWARD,
    differentiable=lambda call: (call.logits,),
    save=_save,
    backward=_gradients,
    give=_give,
)


def of_logits(backend: str, logits: Tensor, rows: Rows, ids: Tensor, with_entropy: bool) -> Events:
    """The events of logits (B, T, V), any strides, under the temperature of ``rows``."""
    if backend == "reference":
        return columns_reference.of_scaled(reference.scaled(logits, rows), ids, with_entropy)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.clone(memory_format=torch.contiguous_format)
    call = ColumnsCall(logits, ids, rows.temperatures, rows.temperature, with_entropy)
    return Events(*_recorded(backend, call))


def logprobs(backend: str, call: TokenCall) -> tuple[Tensor, Tensor]:
    """token_logprobs of the ids: (log-probs (N, K), entropy (N,) or (0,))."""
    assert call.ids is not None
    dtype = torch.float64 if call.logits.dtype == torch.float64 else torch.float32
    found = of_logits(backend, call.logits, call.rows, call.ids, call.with_entropy)
    return events.logprobs(found, dtype)
