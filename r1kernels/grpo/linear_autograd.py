"""linear_grpo_loss: the two ops in a row, or one pass over the logits where the slope of a token is known from the token.

N tokens, H hidden, V vocabulary. One pass costs 6 N V H instead of 8, and keeps the gradients in place of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..logprob import linear_logprobs
from ..logprob import ops as logprob_ops
from ..logprob.linear import Head, cast_as_linear_would
from . import autograd, ops, reference
from .layout import Layout, layout_of
from .linear_ops import Terms
from .metrics import GRPOOutput, Metrics, measured_names
from .options import DEFAULTS, LossOptions
from .reductions import token_weights

IGNORED = -100


def run(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    options: LossOptions,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_size: int | None,
    group: Any,
) -> GRPOOutput:
    """The loss for checked arguments and resolved options, whose ``entropy`` is a bool here."""
    layout = layout_of(mask, options.cu_seqlens)
    entropy = bool(options.entropy) or options.entropy_coef != 0
    head = Head(weight, bias, softcap, logit_scale)
    inputs = (hidden, weight, bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    arguments = (backend, hidden, head, targets, old_logp, advantages, mask, layout)
    if backend != "reference" and differentiable and group is None and _has_token_terms(options):
        return _one_pass(*arguments, temperature, chunk_size, entropy, options)
    return _two_ops(*arguments, temperature, chunk_size, entropy, options, group)


def _has_token_terms(options: LossOptions) -> bool:
    """Whether the slope of a token depends on that token alone."""
    return options.ratio == "token" and options.variant not in ("vespo", "gmpo")


def _two_ops(
    backend: str,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    layout: Layout,
    temperature: float | Tensor,
    chunk_size: int | None,
    entropy: bool,
    options: LossOptions,
    group: Any,
) -> GRPOOutput:
    """linear_logprobs, then grpo_loss, whose gradient the former's backward turns into that of the logits."""
    if isinstance(temperature, Tensor):
        temperature = torch.where(layout.mask, temperature, 1.0)
    result = linear_logprobs(
        torch.where(layout.mask.unsqueeze(-1), hidden, 0.0),
        head.weight,
        torch.where(layout.mask, targets, IGNORED),
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        return_entropy=entropy,
        ignore_index=IGNORED,
        chunk_size=chunk_size,
        group=group,
        backend=backend,
    )
    logp, value = result if entropy else (result, None)
    loss = reference.grpo_loss if backend == "reference" else partial(autograd.run, backend)
    return loss(logp, old_logp, advantages, mask, options._replace(entropy=value))


def _one_pass(
    backend: str,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    layout: Layout,
    temperature: float | Tensor,
    chunk_size: int | None,
    entropy: bool,
    options: LossOptions,
) -> GRPOOutput:
    """Forward and backward of the head together, a few tokens at a time."""
    weights = options.weights
    if weights is None:
        weights = token_weights(layout, options.reduction, options.totals, options.cu_seqlens, torch.float32)
    if advantages.shape == (layout.num_sequences,):
        advantages = advantages.unsqueeze(1)

    def tokens(values: Any) -> Any:
        """Float32 values of all tokens in a row, contiguous, or None."""
        return None if values is None else layout.to_tokens(values.detach()).float().reshape(-1).contiguous()

    numbers, variant, _, kl = autograd.constants_of(options, 1.0)
    terms = Terms(
        tokens(old_logp),
        tokens(advantages),
        layout.mask.reshape(-1),
        tokens(options.ref_logp),
        tokens(options.policy_weights),
        tokens(options.entropy_weights),
        tokens(weights),
        numbers,
        variant,
        kl,
        options.entropy_coef != 0,
    )
    hidden, head = cast_as_linear_would(hidden, head)
    rows = logprob_ops.Rows(
        None if head.bias is None else head.bias.float().contiguous(),
        head.logit_scale,
        head.softcap or 0.0,
        targets.reshape(-1).contiguous(),
        temperature.float().reshape(-1).contiguous() if isinstance(temperature, Tensor) else None,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        IGNORED,
        0,
        head.weight.shape[0],
    )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    needs = tuple(x is not None and x.requires_grad for x in (hidden, head.weight, rows.bias))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, metrics = LinearGRPOLoss.apply(
            backend, hidden, head.weight, *rows, chunk_size or 0, entropy, *terms, *needs
        )
    clips = "clip_high" in DEFAULTS[options.variant]
    return GRPOOutput(loss, Metrics(metrics, measured_names(options.ref_logp is not None, entropy, clips)))


class LinearGRPOLoss(torch.autograd.Function):
    """(backend, hidden, weight, *rows, chunk_size, entropy, *terms, *needs) -> (loss, metrics); keeps the gradients."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        op = getattr(ops.namespace, f"linear_grpo_loss_{backend}")
        loss, metrics, *grads, unit = op(hidden, weight, bias, *arguments)
        ctx.save_for_backward(hidden, weight, bias, unit, *grads)
        ctx.unused = len(arguments)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unused = (None,) * ctx.unused
        upstream = grads[0]
        if upstream is None:
            return None, None, None, None, *unused
        hidden, weight, bias, unit, *held = ctx.saved_tensors
        given: list[Tensor | None] = []
        for grad, tensor, needed in zip(held, (hidden, weight, bias), ctx.needs_input_grad[1:4], strict=True):
            if not needed:
                given.append(None)
                continue
            with torch.no_grad():
                scaled = (grad * (upstream / unit)).to(tensor.dtype)
            given.append(checks.first_derivative_only("linear_grpo_loss", scaled, tensor))
        return None, *given, *unused


def reasons(
    of_head: Callable[..., tuple[str, ...]],
    of_loss: Callable[..., tuple[str, ...]],
    hidden: Tensor,
    weight: Tensor,
    *unused: object,
    **unused_too: object,
) -> tuple[str, ...]:
    """Why this call can not be served: what the backend's linear_logprobs and grpo_loss say (arguments of ``run``)."""
    found = (*of_head(hidden, Head(weight, None, None, 1.0)), *of_loss(hidden))
    return tuple(dict.fromkeys(found))
