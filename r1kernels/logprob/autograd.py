"""One autograd function around every backend of token_logprobs.

It stands outside the torch ops and is entered only where a gradient is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, transforms
from . import ops, reference
from .completions import Completions


def run(
    backend: str,
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    inplace_backward: bool,
    completions: Completions | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy (both (N,); entropy is empty where not asked for), differentiable in the logits.

    logits (B, T, V) of any strides, temperatures (N,) in the dtype of the results or None; the rest as in ``ops.Rows``. With
    completions (kernels only) both are their sums or means, (B,), whose gradients the kernel looks up by token.
    """
    if backend != "reference" and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        # kernels read rows of stride 1, of an empty tensor too, which contiguous() gives back as it is
        logits = logits.clone(memory_format=torch.contiguous_format)
    arguments = (logits, targets, temperatures, temperature, ignore_index, entropy)
    if torch.is_grad_enabled() and logits.requires_grad and not transforms.active():
        logp, value = TokenLogprobs.apply(
            *arguments, inplace_backward, backend, *(completions or (None,) * 3)
        )
        return logp, value
    logp, value, _ = _forward(backend, *arguments)
    if completions is None:
        return logp, value
    return completions.reduce(logp), completions.reduce(value) if entropy else value


class TokenLogprobs(torch.autograd.Function):
    """(logits, ..., backend, completions) -> (logp, entropy); saves the logits and a few numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        ignore_index: int,
        entropy: bool,
        inplace_backward: bool,
        backend: str,
        count: int | None,
        cu_seqlens: Tensor | None,
        divisor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logp, value, stats = _forward(
            backend, logits, targets, temperatures, temperature, ignore_index, entropy
        )
        ctx.save_for_backward(logits, targets, temperatures, logp, stats, cu_seqlens, divisor)
        ctx.temperature, ctx.ignore_index, ctx.entropy = temperature, ignore_index, entropy
        ctx.inplace_backward, ctx.backend, ctx.count = inplace_backward, backend, count
        ctx.set_materialize_grads(False)
        if count is None:
            return logp, value
        completions = Completions(count, cu_seqlens, divisor)
        return completions.reduce(logp), completions.reduce(value) if entropy else value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unused = (None,) * 10
        grad_logp = grads[0]
        grad_entropy = grads[1] if ctx.entropy else None
        if grad_logp is None and grad_entropy is None:
            return None, *unused
        logits, targets, temperatures, logp, stats, cu_seqlens, divisor = ctx.saved_tensors
        upstream = by_token_or_completion(grad_logp, grad_entropy, logp, ctx.count, cu_seqlens, divisor)
        arguments = (targets, temperatures, ctx.temperature, ctx.ignore_index, logp, stats, *upstream)
        if ctx.inplace_backward:
            grad = logits.detach()
            with torch.no_grad():
                _backward_inplace(ctx.backend, grad, *arguments)
            # a later reader of the logits, a second backward among them, now gets autograd's version error
            torch.autograd.graph.increment_version(logits)
        else:
            with torch.no_grad():
                grad = _backward(ctx.backend, logits, *arguments)
        return checks.first_derivative_only("token_logprobs", grad, logits), *unused


def by_token_or_completion(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logp: Tensor,
    count: int | None,
    cu_seqlens: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """(grad_logp, grad_entropy, sequences) for a kernel; ``sequences`` is None where the gradients are those of tokens."""
    if count is None:
        return *(None if grad is None else grad.contiguous() for grad in (grad_logp, grad_entropy)), None
    completions = Completions(count, cu_seqlens, divisor)
    sequences = completions.sequences(logp.shape[0], logp.device)
    return completions.gradient(grad_logp), completions.gradient(grad_entropy), sequences


def plain_rows(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, ignore_index: int
) -> ops.Rows:
    """The rows of logits (B, T, V) that are the whole vocabulary and need no bias, scale or cap."""
    return ops.Rows(None, 1.0, 0.0, targets, temperatures, temperature, ignore_index, 0, logits.shape[2])


def _forward(backend: str, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return reference.forward(logits, *arguments)
    *call, entropy = arguments
    return ops.forward(backend, logits, plain_rows(logits, *call), entropy)[:3]


def _backward(backend: str, logits: Tensor, *arguments: Any) -> Tensor:
    if backend == "reference":
        return reference.backward(logits, *arguments[:-1])
    return ops.backward(backend, logits, plain_rows(logits, *arguments[:4]), *arguments[4:])


def _backward_inplace(backend: str, logits: Tensor, *arguments: Any) -> None:
    if backend == "reference":
        logits.copy_(reference.backward(logits, *arguments[:-1]))
    else:
        ops.backward_(backend, logits, plain_rows(logits, *arguments[:4]), *arguments[4:])
