"""One autograd function around every backend of token_logprobs.

It stands outside the torch ops and is entered only where a gradient is needed. A backend is a pair of functions with
the argument lists of ``reference.forward`` and ``reference.backward``; a third one writes the gradient over the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import ops, reference


def run(
    backend: str,
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy (both (N,); entropy is empty where not asked for), differentiable in the logits.

    The arguments are those of ``ops.py``, with logits (B, T, V) of any strides and temperatures of any floating dtype.
    """
    if backend != "reference":
        # kernels read rows of stride 1 and temperatures in float32
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            logits = logits.contiguous()
        temperatures = None if temperatures is None else temperatures.float()
    arguments = (logits, targets, temperatures, temperature, ignore_index, entropy)
    if torch.is_grad_enabled() and logits.requires_grad:
        logp, value = TokenLogprobs.apply(*arguments, inplace_backward, backend)
        return logp, value
    logp, value, _ = _forward(backend, *arguments)
    return logp, value


class TokenLogprobs(torch.autograd.Function):
    """(logits, ..., inplace_backward, backend) -> (logp, entropy); saves the logits and three numbers a token."""

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
    ) -> tuple[Tensor, Tensor]:
        logp, value, stats = _forward(
            backend, logits, targets, temperatures, temperature, ignore_index, entropy
        )
        ctx.save_for_backward(logits, targets, temperatures, logp, stats)
        ctx.temperature, ctx.ignore_index, ctx.entropy = temperature, ignore_index, entropy
        ctx.inplace_backward, ctx.backend = inplace_backward, backend
        ctx.set_materialize_grads(False)
        return logp, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unused = (None,) * 7
        grad_logp = grads[0]
        grad_entropy = grads[1] if ctx.entropy else None
        if grad_logp is None and grad_entropy is None:
            return None, *unused
        logits, targets, temperatures, logp, stats = ctx.saved_tensors
        arguments = (targets, temperatures, ctx.temperature, ctx.ignore_index, logp, stats)
        arguments += tuple(None if grad is None else grad.contiguous() for grad in (grad_logp, grad_entropy))
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


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return reference.forward(*arguments)
    return getattr(ops.namespace, f"token_logprobs_{backend}")(*arguments)


def _backward(backend: str, *arguments: Any) -> Tensor:
    if backend == "reference":
        return reference.backward(*arguments)
    return getattr(ops.namespace, f"token_logprobs_{backend}_backward")(*arguments)


def _backward_inplace(backend: str, logits: Tensor, *arguments: Any) -> None:
    if backend == "reference":
        logits.copy_(reference.backward(logits, *arguments))
    else:
        getattr(ops.namespace, f"token_logprobs_{backend}_backward_")(logits, *arguments)
