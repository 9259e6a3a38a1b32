"""What the ops on hidden states and a head share behind their arguments: the rows of a head, and the gradients of its inputs.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..op import Kernel
from . import sharded
from .arguments import Head
from .token import Rows

# on a CPU: logits up to this size are kept for the backward where the caller does not say
SAVED_BYTES = 256 << 20
Call = Any  # of an op, or of its backward: hidden states (N, H), the weight (V, H) of a head, and rows with its bias
Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden, weight and bias


def rows_of(
    head: Head,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    shard: sharded.Shard | None = None,
) -> Rows:
    """The rows of the logits of ``head``, which is the whole vocabulary or a shard of it, for targets of any shape."""
    first, vocabulary = (0, head.weight.shape[0]) if shard is None else (shard.first, shard.vocabulary)
    return Rows(
        head.bias,
        head.logit_scale,
        head.softcap or 0.0,
        targets.reshape(-1),
        temperatures,
        temperature,
        ignore_index,
        first,
        vocabulary,
    )


def needs_of(call: Call) -> tuple[bool, bool]:
    """(whether an input of ``call`` needs a gradient, whether the head is trained)"""
    bias = call.rows.bias
    trained = call.weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and (trained or call.hidden.requires_grad), trained


def saves(call: Call, save_logits: bool | None) -> bool:
    """Whether (N, V) values are kept for the backward: as the caller says, else by a memory budget."""
    if save_logits is not None:
        return save_logits
    # in a compiled graph a length must not decide
    size = 4 * call.hidden.shape[0] * call.weight.shape[0]
    return size <= devices.memory_budget(call.hidden, SAVED_BYTES) and not torch.compiler.is_compiling()


def hidden_gradient_dtype(call: Call) -> torch.dtype:
    """That of the gradient of hidden: of a slab it is one term of a sum over the slabs, which is not rounded."""
    dtype: torch.dtype = call.hidden.dtype
    return dtype if call.rows.vocabulary == call.weight.shape[0] else torch.float32


def gradient_shapes(call: Call, hidden_dtype: torch.dtype | None = None) -> Gradients:
    """The gradients of hidden, weight and, in float32, bias; (0,) where not needed."""
    hidden, weight = call.hidden, call.weight
    dtype = hidden_gradient_dtype(call) if hidden_dtype is None else hidden_dtype
    return (
        hidden.new_empty(hidden.shape if call.need_hidden else 0, dtype=dtype),
        weight.new_empty(weight.shape if call.need_weight else 0),
        weight.new_empty(weight.shape[0] if call.need_bias else 0, dtype=torch.float32),
    )


def saved_gradient_shapes(call: Call) -> Gradients:
    """The same of a call with the logits of the forward."""
    return gradient_shapes(call.backward)


def gradients(
    backend: str,
    call: Call,
    logits: Tensor | None,
    shard: sharded.Shard | None,
    again: Kernel,
    of_saved: Kernel,
) -> Gradients:
    """From the logits of the forward, which are overwritten, by ``of_saved``; without them by ``again``, which computes them."""
    if logits is None:
        for_hidden, for_weight, for_bias = again(backend, call)
    else:
        # an alias, whose changes autograd does not take for a fault of the caller
        for_hidden, for_weight, for_bias = of_saved(backend, (logits.data, call))
    if shard is not None and call.need_hidden:
        for_hidden = sharded.sum_over_ranks_(for_hidden, shard)
    return for_hidden, for_weight, for_bias


def without_saved(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """``backward`` once more through one graph: the first has overwritten the logits, which come last of the tensors."""

    def once_more(backend: str, inputs: Any, tensors: Any, *others: Any) -> Gradients:
        return backward(backend, inputs, (*tensors[:-1], None), *others)

    return once_more
