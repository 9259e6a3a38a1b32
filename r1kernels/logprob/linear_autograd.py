"""One autograd function around the linear log-prob ops of every kernel backend.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import linear, ops, parts, sharded
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
    shard: sharded.Shard | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(logp, entropy, one (N,) a name of ``stats``); the other arguments are those of ``linear.reference``.

    With completions logp and entropy are their sums or means, (B,).
    """
    hidden, head = linear.cast_as_linear_would(hidden, head)
    inputs = (hidden, head.weight, head.bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    vocabulary = head.weight.shape[0]
    rows = ops.Rows(
        None if head.bias is None else head.bias.float().contiguous(),
        head.logit_scale,
        head.softcap or 0.0,
        targets.contiguous(),
        temperatures,
        temperature,
        ignore_index,
        0 if shard is None else shard.first,
        vocabulary if shard is None else shard.vocabulary,
    )
    # a frozen head under the log-prob alone: its slope is worked out beside it, without the logits once more
    alone = not (entropy or save_logits or batch_invariant) and shard is None
    frozen = alone and hidden.requires_grad and not any(x is not None and x.requires_grad for x in inputs[1:])
    if save_logits is None:
        # in a compiled graph a length must not decide
        save_logits = not torch.compiler.is_compiling() and 4 * hidden.shape[0] * vocabulary <= SAVED_BYTES
    options = (entropy, bool(stats), chunk_size or 0, save_logits and differentiable, batch_invariant)
    with torch.autocast(hidden.device.type, enabled=False):
        if differentiable and frozen:
            logp, extra = FrozenHead.apply(
                backend,
                hidden,
                head.weight,
                *rows,
                bool(stats),
                chunk_size or 0,
                *(completions or (None,) * 3),
            )
            value = logp.new_empty(0)
        elif differentiable:
            logp, value, extra = LinearLogprobs.apply(
                backend, hidden, head.weight, *rows, *options, shard, *(completions or (None,) * 3)
            )
        else:
            logp, value, _, extra, _ = _forward(backend, hidden, head.weight, rows, options, shard)
            if completions is not None:
                logp, value = completions.reduce(logp), completions.reduce(value) if entropy else value
    return logp, value, linear.of_names(extra, stats)


def _forward(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    rows: ops.Rows,
    options: Sequence[Any],
    shard: sharded.Shard | None,
) -> tuple[Tensor, ...]:
    """What the op ``linear_logprobs_<backend>`` gives for the whole vocabulary."""
    op = getattr(ops.namespace, f"linear_logprobs_{backend}")
    logp, value, stats, extra, logits = op(hidden, weight, *rows, *options)
    if shard is not None:
        part = parts.Part(logp, stats, extra)
        logp, value, stats, extra = sharded.merge(part, shard, rows, entropy=options[0])
    return logp, value, stats, extra, logits


class LinearLogprobs(torch.autograd.Function):
    """(backend, hidden, weight, *rows, *options, shard, *completions) -> (logp, entropy, extra)."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, hidden: Tensor, weight: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        *rows, entropy, extra, chunk_size, save_logits, batch_invariant, shard, count, cu_seqlens, divisor = (
            arguments
        )
        options = (entropy, extra, chunk_size, save_logits, batch_invariant)
        logp, value, stats, extra, logits = _forward(backend, hidden, weight, ops.Rows(*rows), options, shard)
        bias, ctx.logit_scale, ctx.softcap, targets, temperatures, *ctx.numbers = rows
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            targets,
            temperatures,
            logp,
            stats,
            cu_seqlens,
            divisor,
            logits if save_logits else None,
        )
        ctx.logits_used = False
        ctx.backend, ctx.entropy, ctx.chunk_size, ctx.count = backend, entropy, chunk_size, count
        ctx.unused, ctx.shard = len(arguments), shard
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
        hidden, weight, bias, targets, temperatures, logp, stats, cu_seqlens, divisor, logits = (
            ctx.saved_tensors
        )
        rows = (bias, ctx.logit_scale, ctx.softcap, targets, temperatures, *ctx.numbers)
        upstream = by_token_or_completion(grad_logp, grad_entropy, logp, ctx.count, cu_seqlens, divisor)
        arguments = (hidden, weight, *rows, ctx.chunk_size, logp, stats, *upstream)
        needs = (for_hidden, for_weight, for_bias)
        op = f"linear_logprobs_{ctx.backend}_backward"
        with torch.no_grad():
            if logits is None or ctx.logits_used:  # not kept, or a second backward through the same graph
                results = getattr(ops.namespace, op)(*arguments, *needs)
            else:
                ctx.logits_used = True
                # the backward overwrites them: an alias, whose changes autograd does not take for a fault of the caller
                results = getattr(ops.namespace, op + "_")(logits.data, *arguments, *needs)
            if ctx.shard is not None and for_hidden:
                results = (sharded.sum_over_ranks_(results[0], ctx.shard).to(hidden.dtype), *results[1:])
        inputs = (hidden, weight, bias)
        given = tuple(
            checks.first_derivative_only("linear_logprobs", grad, tensor) if needed else None
            for grad, tensor, needed in zip(results, inputs, needs, strict=True)
        )
        return None, *given, *unused


class FrozenHead(torch.autograd.Function):
    """(backend, hidden, weight, *rows, extra, chunk_size, *completions) -> (logp, extra); hidden alone has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, hidden: Tensor, weight: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        *forwarded, count, cu_seqlens, divisor = arguments
        op = getattr(ops.namespace, f"linear_logprobs_{backend}_frozen")
        logp, extra, slope = op(hidden, weight, *forwarded)
        ctx.save_for_backward(hidden, slope, cu_seqlens, divisor)
        ctx.count, ctx.unused = count, len(arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(extra)
        if count is not None:
            logp = Completions(count, cu_seqlens, divisor).reduce(logp)
        return logp, extra

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unused = (None,) * (ctx.unused + 1)
        if grads[0] is None:
            return None, None, *unused
        hidden, slope, cu_seqlens, divisor = ctx.saved_tensors
        with torch.no_grad():
            grad = grads[0]
            if ctx.count is not None:
                grad = Completions(ctx.count, cu_seqlens, divisor).of_tokens(grad, slope.shape[0])
            grad_hidden = (slope * grad.unsqueeze(1)).to(hidden.dtype)
        return None, checks.first_derivative_only("linear_logprobs", grad_hidden, hidden), *unused
