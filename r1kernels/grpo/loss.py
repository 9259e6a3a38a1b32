"""grpo_loss: every published GRPO loss from the log-probs of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..op import Contiguous, Float32, Kernel, Op, recorded
from . import reference
from .layout import advantages_of, num_sequences_of
from .metrics import NAMES, GRPOOutput, Metrics, measured_names
from .objective import RATIOS, Objective, check_call, constants_of, has_clip, resolved
from .reductions import COUNTS, ONE, Divisor, Totals, divisor_of


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    variant: str = "grpo",
    ratio: str | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    delta: float | None = None,
    dual_bound: float | None = None,
    tau: tuple[float, float] | None = None,
    vespo: tuple[tuple[float, float], tuple[float, float]] | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str | None = None,
    policy_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    entropy_weights: Tensor | None = None,
    reduction: str = "sequence",
    weights: Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    max_length: int | float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> GRPOOutput:
    r"""The policy loss of one micro-batch: ``sum_t w_t m_t (p_t l_t + kl_coef KL_t) - entropy_coef sum_t e_t m_t H_t``.

    x, o, r: log-prob of a token under the policy, under the policy that made the sample, under the reference; A:
    advantage; p: ``policy_weights``; sg: no gradient. The terms l and their gradient in x (c: the importance ratio):

    =========== ======================================================= ==========================================
    variant     l                                                       dl/dx
    =========== ======================================================= ==========================================
    "grpo"      -min(min(c, delta) A, clip(c, 1 - low, 1 + high) A)     -c A where the first is the min, c <= delta
    "dual_clip" as grpo, and for A < 0 at most -dual_bound A            0 where the bound binds
    "cispo"     -sg(min(c, clip_high)) A x                              -sg(.) A
    "sapo"      -A sigma(tau (c - 1)) 4 / tau                           -A 4 sigma (1 - sigma) c
    "vespo"     -sg(phi) A x; log phi = lam + k log w - lam w           -sg(phi) A
    "gmpo"      -A G, G the geometric mean of clipped ratios            -A G / sum m where not clipped
    "reinforce" -A x                                                    -A
    =========== ======================================================= ==========================================

    Arguments that are None take the default of the variant; one that the variant does not use raises ValueError.

    Args:
        logp: x, (B, T), or packed (N,) with ``cu_seqlens``; the only argument, with ``entropy``, that gets a gradient.
        old_logp: o, shaped like ``logp``; None: the current policy made the sample, o = sg(x).
        advantages: (B,) or (B, 1), or one per token. A packed (N,) with N = B is read as one per sequence.
        mask: bool or integer, shaped like ``logp``; 0: the token does not count, and whatever stands there, NaN too,
            changes nothing. A token that counts and has log-prob -inf both in ``logp`` and in ``old_logp`` (if given), because it
            is outside a kept set, say, has x - o = 0 and w = 0: it adds nothing and gets no gradient; metrics leave it out and
            count it as num_impossible, reductions and lengths count it as before.
        variant: the loss term.
        ratio: c for grpo, dual_clip, cispo and sapo. "token" (default): exp(x - o). "sequence" (GSPO): the exponential
            of the mean of x - o over the sequence. "output" (the R1 paper's text): of their sum, bounded to +-20; x in
            the term and in the KL is then the sum over the output too.
        clip_low, clip_high: grpo, dual_clip and gmpo: half-widths of the clip, 0.2 and 0.2 (of the log-ratio for gmpo);
            cispo: ``clip_high`` is the largest ratio itself, 5.0.
        delta: grpo: the largest ratio in the unclipped branch, above 1 + clip_high (INTELLECT-2); default: none.
        dual_bound: dual_clip: above 1, default 3.0.
        tau: sapo: the steepness for A > 0 and for A <= 0, default (1.0, 1.05).
        vespo: vespo: (k, lam) for A >= 0 and for A < 0, default ((2, 3), (3, 2)). w = exp of the sum over the sequence of
            x - o and of log ``policy_weights``, each bounded; a phi that is not finite counts as 0.
        ref_logp: r, shaped like ``logp``. With kl_coef = 0 the KL is only measured.
        kl_coef: the weight of the KL term.
        kl: the estimator. "k1": x - r. "abs". "k2": (x - r)^2 / 2. "k3" (default): e^(r - x) - (r - x) - 1, gradient
            1 - e^(r - x). "k3_plus": the value of k3, the gradient of k2. "unbiased" (DeepSeek-V3.2): c k3, gradient
            c (x - r) for token ratios. With ratio="output" k3 of the summed log-probs and no other. k3 is not bounded: from
            r - x = 89 nats on float32 holds neither it nor its gradient (the gradients of k3_plus and "unbiased" stay finite).
        policy_weights: one per token, or (B, 1), or bool: multiplies the policy term, never the KL; in vespo it enters w
            alone. See ``importance_weights``, ``off_policy_mask``, ``top_entropy_mask``.
        entropy: H, shaped like ``logp``; measured, and subtracted from the loss where ``entropy_coef`` is not 0.
        entropy_coef: the weight of the entropy bonus.
        entropy_weights: e, shaped like ``logp``; default: w.
        reduction: "sequence", "token", "constant" or "sequence-sum": w as in ``reduction_weights``.
        weights: w itself, shaped like ``logp``, in place of ``reduction`` and the totals.
        num_sequences, num_tokens, max_length: totals of the whole optimizer step, as in ``reduction_weights``; without
            them this call is taken to be the whole step. A tensor of one element saves torch.compile from a guard.
        cu_seqlens: int32 or int64 (B + 1,), the boundaries of packed sequences: 0, ..., N.
        backend: the name of a backend: that one or an error; None chooses (see r1kernels.backends).

    Returns:
        GRPOOutput(loss, metrics): the loss, a float32 scalar (float64 for float64 log-probs), and a mapping of names to
        0-d views of one tensor: loss, policy_loss (without KL and bonus), kl, entropy, ratio/mean, ratio/max,
        clip_ratio/low_mean, clip_ratio/high_mean, clip_ratio/region_mean (c < 1 - low and A < 0; c > 1 + high and A > 0;
        either), approx_kl = mean(o - x), ess (effective sample size of c over their number, 1 on policy), num_tokens, num_impossible.
        Means are over the counted tokens of this call; where the ratio is one value per sequence, ratio, clip and ess (and
        the KL of "output") count every sequence that has a token once. kl and entropy stand there if they were given,
        the clip ratios if the variant has a clip.

    Raises:
        ValueError: an unknown name, an argument that the variant or reduction does not use, a wrong shape or value.
        TypeError: a wrong type or dtype.

    A ratio beyond float32 (x - o above 88 nats) makes loss and gradient infinite where nothing bounds the term ("grpo" with A < 0
    and no delta), and changes nothing where a clip does.

    Precision: float32 throughout, float64 for float64 log-probs (by the reference alone). A sequence or batch without a
    counted token gives loss 0 and gradient 0. Nothing is read on the host. Deterministic; the reference on CUDA sums packed sequences by
    atomics, so there only under ``torch.use_deterministic_algorithms(True)``.

    Sources: DeepSeekMath (2402.03300), DeepSeek-R1 (2501.12948), DAPO (2503.14476), Dr. GRPO (2503.20783), GSPO
    (2507.18071), CISPO (2506.13585), SAPO (2511.20347), LUSPO (2602.05261), VESPO (2602.10693), GMPO (2507.20673),
    DeepSeek-V3.2 (2512.02556).
    """
    objective = resolved(
        Objective(
            variant,
            ratio,
            clip_low,
            clip_high,
            delta,
            dual_bound,
            tau,
            vespo,
            kl,
            kl_coef,
            entropy_coef,
        ),
        ref_logp is not None,
    )
    if entropy is None:
        for name, unused in (
            ("entropy_coef", entropy_coef != 0),
            ("entropy_weights", entropy_weights is not None),
        ):
            if unused:
                raise ValueError(f"{name}: needs entropy, got None")
    checks.tensor("logp", logp, dtypes=checks.FLOATS)
    checks.tensor("mask", mask, shape=tuple(logp.shape), like=logp)
    sequences = num_sequences_of(mask, cu_seqlens)
    call = LossCall(
        Tokens(
            logp,
            old_logp,
            advantages_of(advantages, sequences, logp),
            mask,
            ref_logp,
            policy_weights,
            entropy,
            entropy_weights,
            weights,
            cu_seqlens,
        ),
        objective,
        reduction,
        Totals(num_sequences, num_tokens, max_length),
    )
    check_call(call, sequences, logp)
    return GRPO_LOSS(backend, call)


class Tokens(NamedTuple):
    """What stands at every token, (B, T), or packed (N,) with cu_seqlens."""

    logp: Float32
    old_logp: Float32 | None  # None: the policy itself
    advantages: Float32  # one per token, or (B, 1): one per sequence
    mask: Contiguous  # bool or integer
    ref_logp: Float32 | None
    policy_weights: Float32 | None  # one per token, or (B, 1)
    entropy: Float32 | None
    entropy_weights: Float32 | None
    weights: Float32 | None  # None: see KernelCall
    cu_seqlens: Contiguous | None  # int32 or int64 (B + 1,); None: padded


class LossCall(NamedTuple):
    tokens: Tokens
    objective: Objective
    reduction: str
    totals: Totals

    @property
    def logp(self) -> Tensor:
        return self.tokens.logp


class KernelCall(NamedTuple):
    """Without ``tokens.weights`` the weight of a token is 1 / (divisor * total * count)."""

    tokens: Tokens
    numbers: Tensor  # objective.Numbers, float32 on the CPU; a tensor, for torch.compile specialises on float arguments
    total: Tensor | None  # float32 (1,) on the device; None: 1
    variant: int  # its place in VARIANTS, and so on: RATIOS, ESTIMATORS (any without ref_logp), COUNTS
    ratio: int
    kl: int
    counted: int
    logp_gradient: bool  # whether to write the gradient; it is empty (0,) otherwise
    entropy_gradient: bool


class Results(NamedTuple):
    """Where the ratio is one per sequence, dL/dx of a counted token is its grad_logp plus grad_of_ratio of the sequence."""

    loss: Tensor  # float32 ()
    metrics: Tensor  # float32: metrics.NAMES; 0 where something was not given
    grad_logp: Tensor  # float32 tokens
    grad_of_ratio: Tensor  # float32 (B,), or (0,) for ratios of tokens
    grad_entropy: Tensor  # float32 tokens


class BackwardCall(NamedTuple):
    grad_loss: Tensor  # float32 (), read on the device
    grad_logp: Tensor  # and so on: results of the forward (empty: not needed)
    grad_of_ratio: Tensor
    grad_entropy: Tensor
    mask: Contiguous
    cu_seqlens: Contiguous | None
    logp: Float32 | None  # with grad_of_ratio alone: a log-prob of -inf gets none of it


def shapes(call: KernelCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logp, cu_seqlens = call.tokens.logp, call.tokens.cu_seqlens
    sequences = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shared = call.logp_gradient and RATIOS[call.ratio] != "token"
    return Results(
        logp.new_empty(()),
        logp.new_empty(len(NAMES)),
        logp.new_empty(logp.shape if call.logp_gradient else (0,)),
        logp.new_empty(sequences if shared else 0),
        logp.new_empty(logp.shape if call.entropy_gradient else (0,)),
    )


def backward_shapes(call: BackwardCall) -> tuple[Tensor, Tensor]:
    return torch.empty_like(call.grad_logp), torch.empty_like(call.grad_entropy)


FORWARD = Kernel("grpo_loss", KernelCall, shapes)
BACKWARD = Kernel("grpo_loss", BackwardCall, backward_shapes, suffix="_backward")


def _save(call: KernelCall, results: tuple[Tensor, ...]) -> Any:
    _, _, *grads = results
    return (*grads, call.tokens.mask, call.tokens.cu_seqlens), None


def _gradients(
    backend: str, inputs: Any, saved: Any, _: Any, grads: Any, needs: Any
) -> tuple[Tensor, Tensor]:
    """The loss is a scalar: the forward wrote the gradients for an upstream gradient of 1, which scales them here."""
    grad_logp, grad_of_ratio, grad_entropy, mask, cu_seqlens = saved
    if _are_final(grads[0], grad_of_ratio):
        return grad_logp, grad_entropy
    logp = inputs[0] if grad_of_ratio.numel() > 0 else None
    return BACKWARD(
        backend, BackwardCall(grads[0], grad_logp, grad_of_ratio, grad_entropy, mask, cu_seqlens, logp)
    )


# unknown to torch: kept, so that nothing is handed out twice
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def _are_final(grad_loss: Tensor, grad_of_ratio: Tensor) -> bool:
    """Whether the gradients that the forward wrote are those of the inputs already, and no one will ask for them again.

    Then the backward hands them out as they are, without a pass over the tokens. It never writes to them: whoever else
    holds them (a saved-tensor hook) finds them unchanged.
    """
    return (
        checks.values_visible(grad_loss)  # a GPU is not waited for
        and grad_of_ratio.numel() == 0
        and not _graph_is_kept()
        and grad_loss.item() == 1
    )


_recorded = recorded(
    "grpo_loss",
    FORWARD,
    differentiable=lambda call: (call.tokens.logp, call.tokens.entropy if call.entropy_gradient else None),
    save=_save,
    backward=_gradients,
    give=lambda call, results: results[:2],
    constant=(1,),
)


def _on_kernels(backend: str, call: LossCall) -> GRPOOutput:
    tokens, objective = call.tokens, call.objective
    entropy, divisor = tokens.entropy, ONE
    if tokens.weights is None:
        divisor = divisor_of(call.reduction, call.totals, tokens.mask, tokens.cu_seqlens)
    gradients = torch.is_grad_enabled()
    logp_gradient = gradients and tokens.logp.requires_grad
    entropy_gradient = (
        gradients and objective.entropy_coef != 0 and entropy is not None and entropy.requires_grad
    )
    loss, metrics = _recorded(
        backend, kernel_call_of(tokens, objective, divisor, logp_gradient, entropy_gradient)
    )
    names = measured_names(tokens.ref_logp is not None, entropy is not None, has_clip(objective.variant))
    return GRPOOutput(loss, Metrics(metrics, names))


def kernel_call_of(
    tokens: Tokens, objective: Objective, divisor: Divisor, logp_gradient: bool, entropy_gradient: bool
) -> KernelCall:
    """The call of a kernel."""
    numbers, variant, ratio, kl = constants_of(objective, divisor.number)
    counted = COUNTS.index(divisor.counted)
    return KernelCall(
        tokens, numbers, divisor.total, variant, ratio, kl, counted, logp_gradient, entropy_gradient
    )


GRPO_LOSS = Op("grpo_loss", reference.grpo_loss, _on_kernels, decides="logp")
