"""One autograd function around the linear log-prob ops of every kernel backend.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from . import linear, ops
from .autograd import by_token_or_completion
from .completions import Completions

SAVED_BYTES = 256 << 20  # logits up to this size are kept for the backward where the caller does not say


def run(
    backend: str,
    completions: Completions | None,
    hidden: Tensor,
    head: linear.Head,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    stats: tuple[str, ...],
    chunk_size: int | None,
    save_logits: bool | None,
    batch_invariant: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(logp, entropy, one (N,) a name of ``stats``); the other arguments are those of ``linear.reference``.

    With completions logp and entropy are their sums or means, (B,).
    """
    hidden, head = linear.cast_as_linear_would(hidden, head)
    inputs = (hidden, head.weight, head.bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    vocabulary = head.weight.shape[0]
    if save_logits is None:
        # in a compiled graph a length must not decide
        save_logits = not torch.compiler.is_compiling() and 4 * hidden.shape[0] * vocabulary <= SAVED_BYTES
    rows = ops.Rows(
        None if head.bias is None else head.bias.float().contiguous(),
        head.logit_scale,
        head.softcap or 0.0,
        targets.contiguous(),
        None if temperatures is None else temperatures.float(),
        temperature,
        ignore_index,
        0,
        vocabulary,
    )
    options = (entropy, bool(stats), chunk_size or 0, save_logits and differentiable, batch_invariant)
    with torch.autocast(hidden.device.type, enabled=False):
        if differentiable:
            logp, value, extra = LinearLogprobs.apply(
                backend, hidden, head.weight, *rows, *options, *(completions or (None,) * 3)
            )
        else:
            op = getattr(ops.namespace, f"linear_logprobs_{backend}")
            logp, value, _, extra, _ = op(hidden, head.weight, *rows, *options)
            if completions is not None:
                logp, value = completions.reduce(logp), completions.reduce(value) if entropy else value
    columns = dict(zip(linear.STATS, extra.unbind(0), strict=False))
    if stats:
        columns["is_top1"] = columns["is_top1"] > 0
    return logp, value, tuple(columns[name] for name in stats)


class LinearLogprobs(torch.autograd.Function):
    """(backend, hidden, weight, *rows, ..., *completions) -> (logp, entropy, extra)."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, hidden: Tensor, weight: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        *forwarded, count, cu_seqlens, divisor = arguments
        *rows, entropy, _, chunk_size, save_logits, _ = forwarded
        op = getattr(ops.namespace, f"linear_logprobs_{backend}")
        logp, value, stats, extra, logits = op(hidden, weight, *forwarded)
        bias, ctx.logit_scale, ctx.softcap, targets, temperatures, *ctx.numbers = rows
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, logp, stats, cu_seqlens, divisor)
        # the backward overwrites them: not a saved tensor, whose every later use would be an error
        ctx.logits = logits if save_logits else None
        ctx.backend, ctx.entropy, ctx.chunk_size, ctx.count = backend, entropy, chunk_size, count
        ctx.unused = len(arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(extra)
        if count is not None:
            completions = Completions(count, cu_seqlens, divisor)
            logp, value = completions.reduce(logp), completions.reduce(value) if entropy else value
        return logp, value, extra

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp = grads[0]
        grad_entropy = grads[1] if ctx.entropy else None
        _, for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        unused = (None,) * (ctx.unused - 1)
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None, *unused
        hidden, weight, bias, targets, temperatures, logp, stats, cu_seqlens, divisor = ctx.saved_tensors
        rows = (bias, ctx.logit_scale, ctx.softcap, targets, temperatures, *ctx.numbers)
        upstream = by_token_or_completion(grad_logp, grad_entropy, logp, ctx.count, cu_seqlens, divisor)
        arguments = (hidden, weight, *rows, ctx.chunk_size, logp, stats, *upstream)
        needs = (for_hidden, for_weight, for_bias)
        op = f"linear_logprobs_{ctx.backend}_backward"
        with torch.no_grad():
            if ctx.logits is None:  # not kept, or a second backward through the same graph
                results = getattr(ops.namespace, op)(*arguments, *needs)
            else:
                logits, ctx.logits = ctx.logits, None
                results = getattr(ops.namespace, op + "_")(logits, *arguments, *needs)
        inputs = (hidden, weight, bias)
        given = tuple(
            checks.first_derivative_only("linear_logprobs", grad, tensor) if needed else None
            for grad, tensor, needed in zip(results, inputs, needs, strict=True)
        )
        return None, *given, *unused
