"""grpo_loss: every published GRPO loss from the log-probs of sampled tokens."""

from __future__ import annotations

from torch import Tensor

from .. import backends, checks
from .layout import num_sequences_of
from .metrics import GRPOOutput
from .options import LossOptions, check_tensors, resolve


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
        advantages: (B,) or (B, 1), or one a token. A packed (N,) with N = B is read as one a sequence.
        mask: bool or integer, shaped like ``logp``; 0: the token does not count, and whatever stands there, NaN too,
            changes nothing.
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
        policy_weights: one a token, or (B, 1), or bool: multiplies the policy term, never the KL; in vespo it enters w
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
        either), approx_kl = mean(o - x), ess (effective sample size of c over their number, 1 on policy), num_tokens.
        Means are over the counted tokens of this call; where the ratio is one value a sequence, ratio, clip and ess (and
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
    options = resolve(
        LossOptions(
            variant=variant,
            ratio=ratio,
            clip_low=clip_low,
            clip_high=clip_high,
            delta=delta,
            dual_bound=dual_bound,
            tau=tau,
            vespo=vespo,
            ref_logp=ref_logp,
            kl_coef=kl_coef,
            kl=kl,
            policy_weights=policy_weights,
            entropy=entropy,
            entropy_coef=entropy_coef,
            entropy_weights=entropy_weights,
            reduction=reduction,
            weights=weights,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_length=max_length,
            cu_seqlens=cu_seqlens,
        )
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
    check_tensors(options, num_sequences_of(mask, cu_seqlens), old_logp, advantages, logp)
    return backends.dispatch("grpo_loss", backend, logp, old_logp, advantages, mask, options)
