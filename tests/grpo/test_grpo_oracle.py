"""grpo_loss against the table of its contract, written out token by token in Python floats with the gradients as stated.

The gradients below are those that the contract states, not autograd's, so that both halves of the table are tested.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch

from r1kernels.grpo import grpo_loss, reduction_weights

LOW, HIGH, DELTA, BOUND, CISPO_HIGH, TAU = 0.2, 0.28, 1.5, 1.6, 1.2, (1.1, 1.4)
VESPO = ((2.0, 3.0), (3.0, 2.0))
RATIO_VARIANTS = ("grpo", "grpo_delta", "dual_clip", "cispo", "sapo")
CALLS = [*itertools.product(RATIO_VARIANTS, ("token", "sequence", "output"))]
CALLS += [(variant, None) for variant in ("vespo", "gmpo", "reinforce")]
KEYWORDS = {
    "grpo": {"clip_low": LOW, "clip_high": HIGH},
    "grpo_delta": {"variant": "grpo", "clip_low": LOW, "clip_high": HIGH, "delta": DELTA},
    "dual_clip": {"variant": "dual_clip", "clip_low": LOW, "clip_high": HIGH, "dual_bound": BOUND},
    "cispo": {"variant": "cispo", "clip_high": CISPO_HIGH},
    "sapo": {"variant": "sapo", "tau": TAU},
    "vespo": {"variant": "vespo", "vespo": VESPO},
    "gmpo": {"variant": "gmpo", "clip_low": LOW, "clip_high": HIGH},
    "reinforce": {"variant": "reinforce"},
}


@dataclass
class Answer:
    """The counted tokens of one sequence."""

    x: list[float]
    o: list[float]
    r: list[float]
    a: list[float]
    w: list[float]
    p: list[float]
    sequence_weight: float | None = None
    gradient: list[float] = field(default_factory=list)


def clamp(value, low, high):
    return min(max(value, low), high)


def ratios(answer, level):
    """c of every token and dc_t / dx_u as a function."""
    differences = [x - o for x, o in zip(answer.x, answer.o, strict=True)]
    n = max(len(differences), 1)
    if level in ("token", None):
        c = [math.exp(d) for d in differences]
        return c, lambda t, u: c[t] if t == u else 0.0
    if level == "sequence":
        s = math.exp(sum(differences) / n)
        return [s] * len(differences), lambda t, u: s / n
    total = sum(differences)
    c = math.exp(clamp(total, -20, 20))
    return [c] * len(differences), lambda t, u: c if abs(total) <= 20 else 0.0


def term_in_ratio(variant, c, a):
    """l and dl/dc of the variants that are functions of the ratio."""
    clipped = clamp(c, 1 - LOW, 1 + HIGH)
    if variant in ("grpo", "grpo_delta", "dual_clip"):
        bounded = min(c, DELTA) if variant == "grpo_delta" else c
        value = -min(bounded * a, clipped * a)
        active = bounded * a <= clipped * a and bounded == c
        if variant == "dual_clip" and a < 0 and value > -BOUND * a:
            return -BOUND * a, 0.0
        return value, -a if active else 0.0
    tau = TAU[0] if a > 0 else TAU[1]
    sigma = 1 / (1 + math.exp(-tau * (c - 1)))
    return -a * sigma * 4 / tau, -a * 4 * sigma * (1 - sigma)


def vespo_phi(answer, a):
    k, lam = VESPO[0] if a >= 0 else VESPO[1]
    log_w = sum(clamp(x - o, -20, 20) for x, o in zip(answer.x, answer.o, strict=True))
    weights = answer.p if answer.sequence_weight is None else [answer.sequence_weight]
    log_w += sum(clamp(math.log(p) if p > 0 else -math.inf, math.log(1e-8), 20) for p in weights)
    log_w = clamp(log_w, math.log(1e-8), 20)
    return math.exp(lam + k * log_w - lam * math.exp(log_w))


def policy_part(answer, variant, level):
    """Adds the policy term's gradient to the answer and returns its loss."""
    c, dc = ratios(answer, level)
    n = len(answer.x)
    loss = 0.0
    for t in range(n):
        a, w = answer.a[t], answer.w[t] * (1.0 if variant == "vespo" else answer.p[t])
        if variant in ("cispo", "vespo", "reinforce"):
            factor = {
                "cispo": lambda t=t: min(c[t], CISPO_HIGH),
                "vespo": lambda a=a: vespo_phi(answer, a),
                "reinforce": lambda: 1.0,
            }[variant]()
            loss += w * -factor * a * (sum(answer.x) if level == "output" else answer.x[t])
            for u in range(n):
                answer.gradient[u] += w * -factor * a * (1.0 if level == "output" or t == u else 0.0)
            continue
        value, slope = term_in_ratio(variant, c[t], a)
        loss += w * value
        for u in range(n):
            answer.gradient[u] += w * slope * dc(t, u)
    return loss


def gmpo_part(answer):
    n, a = len(answer.x), answer.a[0] if answer.a else 0.0
    if n == 0:
        return 0.0
    sign = (a > 0) - (a < 0)
    logs = [x - o for x, o in zip(answer.x, answer.o, strict=True)]
    g = math.exp(sum(sign * min(sign * v, sign * clamp(v, -LOW, HIGH)) for v in logs) / n)
    weight = sum(w * p for w, p in zip(answer.w, answer.p, strict=True))
    for u, v in enumerate(logs):
        active = v <= HIGH if a > 0 else v >= -LOW
        answer.gradient[u] += -a * g * active * weight / n
    return -a * g * weight


def kl_part(answer, kind, level, coef):
    c, dc = ratios(answer, level)
    n = len(answer.x)
    x, r = list(answer.x), list(answer.r)
    if level == "output":
        x, r = [sum(x)] * n, [sum(r)] * n
    loss = 0.0
    for t in range(n):
        d = r[t] - x[t]
        k3 = math.exp(d) - d - 1
        value, slope = {
            "k1": (-d, 1.0),
            "abs": (abs(d), math.copysign(1, -d)),
            "k2": (d * d / 2, -d),
            "k3": (k3, 1 - math.exp(d)),
            "k3_plus": (k3, -d),
            "unbiased": (c[t] * k3, c[t] * (1 - math.exp(d))),
        }[kind]
        loss += answer.w[t] * coef * value
        for u in range(n):
            answer.gradient[u] += answer.w[t] * coef * slope * (1.0 if level == "output" or t == u else 0.0)
            if kind == "unbiased":
                answer.gradient[u] += answer.w[t] * coef * k3 * dc(t, u)
    return loss


def oracle(batch, name, level, weights, policy_weights, kl, coef):
    """The loss and its gradient (B, T)."""
    per_sequence = policy_weights is not None and policy_weights.shape[1] == 1
    spread = torch.ones_like(weights) if policy_weights is None else policy_weights.expand(weights.shape)
    loss, gradient = 0.0, torch.zeros_like(weights)
    for i, mask in enumerate(batch.mask):
        answer = Answer(
            *(values[i][mask].tolist() for values in (batch.logp, batch.old_logp, batch.ref_logp)),
            a=[float(batch.advantages[i])] * int(mask.sum()),
            w=weights[i][mask].tolist(),
            p=spread[i][mask].tolist(),
            sequence_weight=float(policy_weights[i, 0]) if per_sequence else None,
        )
        answer.gradient = [0.0] * len(answer.x)
        loss += gmpo_part(answer) if name == "gmpo" else policy_part(answer, name, level)
        if kl is not None:
            loss += kl_part(answer, kl, level, coef)
        gradient[i][mask] = torch.tensor(answer.gradient, dtype=gradient.dtype)
    return loss, gradient


@pytest.mark.parametrize(("name", "level"), CALLS)
def test_loss_and_gradient_of_every_variant(batch_of, name, level):
    estimators = ("k3",) if level == "output" else ("k1", "abs", "k2", "k3", "k3_plus", "unbiased")
    for seed, reduction in enumerate(("sequence", "token", "constant", "sequence-sum")):
        batch = batch_of(seed=seed, drift=0.5)
        shape = batch.mask.shape
        generator = torch.Generator().manual_seed(seed)
        token_weights = torch.rand(shape, generator=generator, dtype=torch.float64) * 2
        sequence_weights = torch.rand(shape[0], 1, generator=generator, dtype=torch.float64) * 2
        sequence_weights[1] = 0
        w = reduction_weights(batch.mask, reduction).double()
        # over the seeds every estimator meets every kind of weights
        kinds = (None, token_weights, sequence_weights)
        for place, kl in enumerate((None, *estimators), start=seed):
            policy_weights = kinds[place % 3]
            keywords = {} if kl is None else {"ref_logp": batch.ref_logp, "kl_coef": 0.3, "kl": kl}
            loss = grpo_loss(
                batch.logp, batch.old_logp, batch.advantages, batch.mask, **KEYWORDS[name], ratio=level,
                policy_weights=policy_weights, weights=w, **keywords,
            ).loss  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, batch.logp)
            expected, expected_gradient = oracle(batch, name, level, w, policy_weights, kl, 0.3)
            assert loss.item() == pytest.approx(expected, rel=1e-11, abs=1e-13)
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


def test_every_branch_of_the_clips_is_exercised(batch_of):
    """The batches above reach each side of every bound; otherwise the test above would prove less than it says."""
    seen = set()
    for seed in range(4):
        batch = batch_of(seed=seed, drift=0.5)
        ratio = (batch.logp - batch.old_logp).exp()[batch.mask]
        signs = batch.advantages.unsqueeze(1).expand(batch.mask.shape)[batch.mask] > 0
        for bound in (1 - LOW, 1 + HIGH, DELTA, BOUND, CISPO_HIGH):
            seen |= {(bound, bool(c > bound), bool(s)) for c, s in zip(ratio, signs, strict=True)}
    assert len(seen) == 20


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant", "sequence-sum"])
def test_named_reductions(batch_of, reduction):
    batch = batch_of(seed=9)
    lengths = batch.mask.sum(1).tolist()
    count, longest = len(lengths), batch.mask.shape[1]
    expected = {
        "sequence": [1 / (count * max(n, 1)) for n in lengths],
        "token": [1 / sum(lengths)] * count,
        "constant": [1 / (count * longest)] * count,
        "sequence-sum": [1 / count] * count,
    }[reduction]
    expected = torch.tensor(expected).unsqueeze(1) * batch.mask
    w = reduction_weights(batch.mask, reduction)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=0)
    by_name = grpo_loss(batch.logp, batch.old_logp, batch.advantages, batch.mask, reduction=reduction).loss
    by_weight = grpo_loss(batch.logp, batch.old_logp, batch.advantages, batch.mask, weights=w.double()).loss
    torch.testing.assert_close(by_name, by_weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_entropy_bonus(batch_of, weighted):
    batch = batch_of(seed=2)
    e = torch.rand(batch.mask.shape, dtype=torch.float64) if weighted else None
    with_bonus = grpo_loss(
        batch.logp, batch.old_logp, batch.advantages, batch.mask, reduction="token", entropy=batch.entropy,
        entropy_coef=0.7, entropy_weights=e,
    )  # fmt: skip
    without = grpo_loss(batch.logp, batch.old_logp, batch.advantages, batch.mask, reduction="token")
    used = batch.mask.double() * (e if weighted else 1 / batch.mask.sum().double())
    bonus = 0.7 * (used * batch.entropy.detach()).sum()
    torch.testing.assert_close(with_bonus.loss, without.loss - bonus)
    (gradient,) = torch.autograd.grad(with_bonus.loss, batch.entropy)
    torch.testing.assert_close(gradient, -0.7 * used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_computed_in_float32(batch_of, dtype):
    """The loss is a float32 one of the rounded log-probs, and the gradient comes back in their dtype."""
    batch = batch_of(seed=4)
    logp = batch.logp.detach().to(dtype).requires_grad_()
    old, ref = batch.old_logp.to(dtype), batch.ref_logp.to(dtype)
    keywords = {"kl_coef": 0.2}
    output = grpo_loss(logp, old, batch.advantages.float(), batch.mask, ref_logp=ref, **keywords)
    assert output.loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(output.loss, logp)
    assert gradient.dtype == dtype
    exact = logp.detach().double().requires_grad_()
    expected = grpo_loss(
        exact, old.double(), batch.advantages.float(), batch.mask, ref_logp=ref.double(), **keywords
    ).loss
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected, exact)[0], rtol=4 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize(("name", "level"), [call for call in CALLS if call[0] not in ("cispo", "vespo")])
def test_gradcheck(batch_of, name, level):
    """Numerical derivatives; CISPO and VESPO hold their weight constant, so theirs is not the gradient of their value."""
    batch = batch_of(seed=11, num_sequences=3, num_tokens=4)

    def loss(logp, entropy):
        return grpo_loss(
            logp, batch.old_logp, batch.advantages, batch.mask, **KEYWORDS[name], ratio=level,
            ref_logp=batch.ref_logp, kl_coef=0.3, kl="k3" if level == "output" else "unbiased", entropy=entropy,
            entropy_coef=0.1,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (batch.logp, batch.entropy))
