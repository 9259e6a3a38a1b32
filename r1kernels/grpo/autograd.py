"""The kernel backends of grpo_loss: from checked arguments to the call of an op, and one autograd function around it.

The autograd function stands outside the torch ops and is entered only where a gradient is needed. The loss is a scalar,
so the forward op writes its gradients at once, for an upstream gradient of 1; the backward op scales them by it, and is
not called where they are handed out as they are (``_are_final``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import ops
from .metrics import GRPOOutput, Metrics, measured_names
from .options import DEFAULTS, TERMS, LossOptions
from .reductions import Divisor, divisor_of


def run(
    backend: str,
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    options: LossOptions,
) -> GRPOOutput:
    """The loss for checked arguments and resolved options."""
    cu_seqlens = options.cu_seqlens
    sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    divisor = (
        divisor_of(options.reduction, options.totals, mask, cu_seqlens)
        if options.weights is None
        else Divisor(1.0, None, "one")
    )
    numbers, *places = constants_of(options, divisor.number)
    arguments = (
        kernel_values(old_logp),
        kernel_values(advantages.unsqueeze(1) if advantages.shape == (sequences,) else advantages),
        mask.contiguous(),
        kernel_values(options.ref_logp),
        kernel_values(options.policy_weights),
        kernel_values(options.entropy_weights),
        kernel_values(options.weights),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        numbers,
        divisor.total,
        *places,
        ops.COUNTS.index(divisor.counted),
    )
    logp, entropy = kernel_values(logp, True), kernel_values(options.entropy, True)
    differentiable = torch.is_grad_enabled()
    logp_gradient = differentiable and logp.requires_grad
    entropy_gradient = (
        differentiable and entropy is not None and entropy.requires_grad and options.entropy_coef != 0
    )
    if logp_gradient or entropy_gradient:
        loss, metrics = GRPOLoss.apply(logp, entropy, arguments, logp_gradient, entropy_gradient, backend)
    else:
        loss, metrics, *_ = _forward(backend, logp, entropy, arguments, False, False)
    clips = "clip_high" in DEFAULTS[options.variant]
    names = measured_names(options.ref_logp is not None, entropy is not None, clips)
    return GRPOOutput(loss, Metrics(metrics, names))


_NO_VESPO = ((0.0, 0.0), (0.0, 0.0))


class GRPOLoss(torch.autograd.Function):
    """(logp, entropy, ...) -> (loss, metrics); saves the gradients that the forward wrote."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        entropy: Tensor | None,
        arguments: tuple[Any, ...],
        logp_gradient: bool,
        entropy_gradient: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, *grads = _forward(backend, logp, entropy, arguments, logp_gradient, entropy_gradient)
        mask, cu_seqlens = arguments[2], arguments[7]
        ctx.save_for_backward(logp, entropy, *grads, mask, cu_seqlens)
        ctx.backend, ctx.wanted = backend, (logp_gradient, entropy_gradient)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logp, entropy, *saved = ctx.saved_tensors
        of_logp = of_entropy = None
        if grads[0] is not None:
            if _are_final(grads[0], saved[1]):
                to_logp, to_entropy = saved[0], saved[2]
            else:
                op = getattr(ops.namespace, f"grpo_loss_{ctx.backend}_backward")
                to_logp, to_entropy = op(grads[0].detach(), *saved)
            if ctx.wanted[0]:
                of_logp = checks.first_derivative_only("grpo_loss", to_logp, logp)
            if ctx.wanted[1]:
                of_entropy = checks.first_derivative_only("grpo_loss", to_entropy, entropy)
        return of_logp, of_entropy, None, None, None, None


# unknown to torch: kept, so that nothing is handed out twice
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def _are_final(upstream: Tensor, grad_of_ratio: Tensor) -> bool:
    """Whether the gradients that the forward wrote are those of the inputs already, and nobody will ask for them again.

    Then the backward hands them out as they are, without a pass over the tokens. It never writes to them: whoever else
    holds them (a saved-tensor hook) finds them unchanged.
    """
    return (
        checks.values_visible(upstream)  # a GPU is not waited for
        and not torch.is_grad_enabled()
        and grad_of_ratio.numel() == 0
        and not _graph_is_kept()
        and upstream.item() == 1
    )


def _forward(
    backend: str,
    logp: Tensor,
    entropy: Tensor | None,
    arguments: tuple[Any, ...],
    logp_gradient: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, ...]:
    op = getattr(ops.namespace, f"grpo_loss_{backend}")
    return op(logp, *arguments[:5], entropy, *arguments[5:], logp_gradient, entropy_gradient)


def kernel_values(values: Any, differentiable: bool = False) -> Any:
    """A tensor, or None, as kernels read it: float32, contiguous, without gradient unless ``differentiable``."""
    if values is None:
        return None
    if values.requires_grad and not differentiable:
        values = values.detach()
    # asked first: each call that would change nothing costs as much as the kernel of a small batch
    if values.dtype is torch.float32 and values.is_contiguous():
        return values
    return values.float().contiguous()


def constants_of(options: LossOptions, divisor: float) -> tuple[Tensor, int, int, int]:
    """What the ops take of the hyper-parameters: numbers, variant, ratio and kl."""
    constants = _constants if torch.compiler.is_compiling() else _kept_constants
    return constants(options[:TERMS], options.kl_coef, options.entropy_coef, divisor)


def _constants(
    terms: tuple[Any, ...], kl_coef: float, entropy_coef: float, divisor: float
) -> tuple[Tensor, int, int, int]:
    options = LossOptions(*terms)
    low = 0.0 if options.clip_low is None else options.clip_low
    high = 0.0 if options.clip_high is None else options.clip_high
    if options.variant in ("grpo", "dual_clip"):
        low, high = 1 - low, 1 + high
    else:
        low = -low
    numbers = ops.numbers_tensor(
        (
            low,
            high,
            math.inf if options.delta is None else options.delta,
            math.inf if options.dual_bound is None else options.dual_bound,
            *((0.0, 0.0) if options.tau is None else options.tau),
            *(number for pair in (_NO_VESPO if options.vespo is None else options.vespo) for number in pair),
            kl_coef,
            entropy_coef,
            divisor,
        )
    )
    return (
        numbers,
        ops.VARIANTS.index(options.variant),
        ops.RATIOS.index(options.ratio),
        ops.ESTIMATORS.index(options.kl or "k3"),
    )


_kept_constants = lru_cache(maxsize=64)(
    _constants
)  # most steps have those of the step before; ops only read them
