"""The verl adapter, on a stand-in for verl.

verl itself is heavy and not installed. The stand-in has the modules, names and signatures of verl's main branch of 2026-08
(verl.utils.kernel.linear_cross_entropy, verl.utils.torch_functional, verl.trainer.ppo.core_algos); behind them stand
the published formulas, token by token in float64, so it is the oracle too.
"""

from __future__ import annotations

import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from r1kernels.grpo import grpo_loss
from r1kernels.integrations import verl as r1
from r1kernels.integrations import verl_losses

B, T = 4, 6


def aggregate(
    terms, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None
):
    """verl's ways to one number, by loops: terms[b][t] are counted where the mask is 1."""
    rows = [[terms[b][t] for t in range(T) if mask[b, t]] for b in range(B)]
    rows = [row for row in rows if row]
    tokens = batch_num_tokens or sum(len(row) for row in rows)
    responses = global_batch_size or len(rows)
    if mode == "token-mean":
        return sum(sum(row) for row in rows) / tokens * dp_size
    if mode == "token-sum":
        return sum(sum(row) for row in rows) * dp_size
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / responses * dp_size
    total = sum(sum(row) for row in rows) / responses * dp_size
    return total / (loss_scale_factor or T) if mode == "seq-mean-token-sum-norm" else total


def moved_too_far(name, x, old, A, config):
    """Whether DPPO leaves a token out: its probability p has gone from q in the direction of A, too far."""
    p, q = math.exp(x), math.exp(old)
    if (p - q) * A <= 0 and (A != 0 or p >= q):
        return False
    distance = abs(p - q)
    if name == "dppo_kl":
        distance = q * (old - x) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return distance > (config.clip_ratio_high if A > 0 else config.clip_ratio_low)


def by_covariance(name, x, old, advantage, mask, config):
    """The (b, t) that clip_cov leaves out, or that kl_cov holds back: large covariance of log-prob and advantage."""
    places = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]
    means = [sum(float(values[place]) for place in places) / len(places) for values in (x, advantage)]
    found = {place: (float(x[place]) - means[0]) * (float(advantage[place]) - means[1]) for place in places}
    options = config.policy_loss
    if name == "kl_cov":
        count = max(int(options.kl_cov_ratio * len(places)), 1)
        return sorted(places, key=found.__getitem__)[-count:]
    low, high = config.clip_ratio_low, config.clip_ratio_high
    ratios = {place: math.exp(x[place] - old[place]) for place in places}
    clipped = {
        place for place in places
        if (advantage[place] > 0 and ratios[place] > 1 + high) or (advantage[place] < 0 and ratios[place] < 1 - low)
    }  # fmt: skip
    large = [
        one for one in places if options.clip_cov_lb < found[one] < options.clip_cov_ub and one not in clipped
    ]
    order = torch.randperm(len(large)).tolist()
    return [large[i] for i in order[: max(int(options.clip_cov_ratio * len(places)), 1)]]


def per_token(name, x, old, advantage, mask, config):
    """The loss of every token as a 0-d tensor with gradient."""
    terms = []
    chosen = by_covariance(name, x, old, advantage, mask, config) if name.endswith("cov") else []
    for b in range(B):
        drift = sum((x[b, t] - old[b, t]) * mask[b, t] for t in range(T)) / max(int(mask[b].sum()), 1)
        row = []
        for t in range(T):
            A = float(advantage[b, t])
            ratio = (x[b, t] - old[b, t]).exp()
            if name == "gspo":  # the ratio of the sequence, its gradient through the token alone
                ratio = drift.detach().exp() * (x[b, t] - x[b, t].detach()).exp()
            clipped = min(max(ratio, 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)
            if name == "gpg":
                row.append(-A * x[b, t])
            elif name == "sapo":
                tau = config.tau_pos if A > 0 else config.tau_neg
                row.append(-A * 4 / tau / (1 + (-tau * (ratio - 1)).exp()))
            elif name == "cispo":
                row.append(-A * float(clipped) * x[b, t])
            elif name.startswith("dppo"):
                kept = not moved_too_far(name, float(x[b, t]), float(old[b, t]), A, config)
                row.append(-A * min(float(ratio), config.clip_ratio_c) * x[b, t] * kept)
            elif name == "dro":
                row.append(-A * x[b, t] + config.policy_loss.dro_beta / 2 * (x[b, t] - old[b, t]) ** 2)
            elif name == "kl_cov":
                row.append(-A * ratio)
                if (b, t) in chosen:
                    row[t] = row[t] + config.policy_loss.ppo_kl_coef * (x[b, t] - old[b, t]).abs()
            else:
                worse = max(-A * ratio, -A * clipped) * ((b, t) not in chosen)
                row.append(min(worse, -A * config.clip_ratio_c) if name == "vanilla" and A < 0 else worse)
        terms.append(row)
    return terms


def geometric_means(x, old, advantage, mask, config, weights):
    """geo_mean: the loss of every response, over tokens whose log-ratio is clipped; an empty one counts in the mean."""
    losses = []
    for b in range(B):
        tokens = [t for t in range(T) if mask[b, t]]
        A = sum(float(advantage[b, t]) for t in tokens) / max(len(tokens), 1)
        sign = 1 if A > 0 else -1
        moved = [x[b, t] - old[b, t] for t in tokens]
        inside = [one.clamp(-config.clip_ratio_low, config.clip_ratio_high) for one in moved]
        moved = [sign * min(sign * one, sign * other) for one, other in zip(moved, inside, strict=True)]
        weight = 1.0
        if weights is not None and tokens:
            weight = math.exp(sum(math.log(weights[b, t] + 1e-10) for t in tokens) / len(tokens))
        losses.append(-A * weight * (sum(moved) / len(tokens)).exp() if tokens else 0.0)
    return sum(losses) / B


def own_loss(name):
    def loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
             rollout_is_weights=None):  # fmt: skip
        if name == "geo_mean":
            batch = (log_prob, old_log_prob, advantages, response_mask)
            return geometric_means(*batch, config, rollout_is_weights), {}
        terms = per_token(name, log_prob, old_log_prob, advantages, response_mask, config)
        if rollout_is_weights is not None:
            terms = [[terms[b][t] * rollout_is_weights[b, t] for t in range(T)] for b in range(B)]
        mode = "seq-mean-token-mean" if name in ("gspo", "sapo") else loss_agg_mode
        return aggregate(terms, response_mask, mode, **config.global_batch_info), {}

    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """Only its signature: what verl computes there needs a GPU."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        raise NotImplementedError


def own_logprobs_from_logits(logits, labels, inplace_backward=True):
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@pytest.fixture
def verl(monkeypatch):
    """Stand-ins for the modules of verl that the adapter touches, and a worker that imported from them by name."""
    registry = {name: own_loss(name) for name in r1.LOSSES}

    def register_policy_loss(name):
        return lambda function: registry.setdefault(name, function)

    contents = {
        "verl.utils.kernel.linear_cross_entropy": {
            "LinearCrossEntropy": LinearCrossEntropy,
            "linear_cross_entropy": LinearCrossEntropy.apply,
        },
        "verl.utils.torch_functional": {"logprobs_from_logits": own_logprobs_from_logits},
        "verl.trainer.ppo.core_algos": {
            "register_policy_loss": register_policy_loss,
            "get_policy_loss_fn": registry.__getitem__,
            "POLICY_LOSS_REGISTRY": registry,
        },
        "verl.workers.engine": {"logprobs_from_logits": own_logprobs_from_logits},
    }
    for path in contents:
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for path, names in contents.items():
        vars(sys.modules[path]).update(names)
    return SimpleNamespace(
        kernels=sys.modules["verl.utils.kernel.linear_cross_entropy"],
        functional=sys.modules["verl.utils.torch_functional"],
        algorithms=sys.modules["verl.trainer.ppo.core_algos"],
        worker=sys.modules["verl.workers.engine"],
        registry=registry,
    )


def test_without_verl_it_says_so():
    assert "verl" not in sys.modules  # importing the adapter did not need it
    for function in (r1.patch, r1.register_policy_losses):
        with pytest.raises(ImportError, match="verl"):
            function()


def test_the_functions_are_replaced_and_put_back(verl):
    own = verl.kernels.linear_cross_entropy
    with r1.patch():
        assert verl.kernels.linear_cross_entropy is r1.linear_cross_entropy
        assert (
            verl.functional.logprobs_from_logits
            is verl.worker.logprobs_from_logits
            is r1.logprobs_from_logits
        )
        with pytest.raises(ValueError, match="not patched yet"):
            r1.patch()
    assert verl.kernels.linear_cross_entropy is own
    assert (
        verl.functional.logprobs_from_logits is verl.worker.logprobs_from_logits is own_logprobs_from_logits
    )


@pytest.mark.parametrize("what", ["head", "logits", "loss"])
def test_other_signatures_are_refused(verl, what):
    def other(logits, labels):
        pass

    if what == "head":
        verl.kernels.LinearCrossEntropy = SimpleNamespace(forward=lambda ctx, hidden, weight, labels: None)
        with pytest.raises(
            RuntimeError, match=r"LinearCrossEntropy.forward: expected .* has \(ctx, hidden, weight, labels\)"
        ):
            r1.patch()
    elif what == "logits":
        verl.functional.logprobs_from_logits = other
        with pytest.raises(RuntimeError, match=r"logprobs_from_logits: .* has \(logits, labels\)"):
            r1.patch()
        assert verl.functional.logprobs_from_logits is other
    else:
        verl.registry["gpg"] = other
        with pytest.raises(RuntimeError, match=r"policy loss 'gpg': .* has \(logits, labels\)"):
            r1.register_policy_losses()
        assert set(verl.registry) == set(r1.LOSSES)


def test_an_older_verl_gets_the_losses_that_it_has(verl):
    del verl.registry["dro"], verl.registry["cispo"]
    names = r1.register_policy_losses()
    assert len(names) == len(r1.LOSSES) - 2 and not {"r1kernels_dro", "r1kernels_cispo"} & {
        *names,
        *verl.registry,
    }


@pytest.mark.parametrize("name", r1.LOSSES)
def test_a_batch_without_a_token_is_no_loss(verl, name):
    x, old, advantages, mask, _ = responses(3)
    for part in (slice(None), slice(0)):  # also one without a response, or of no length
        for given in (
            [each[part] for each in (old, x, advantages, mask)],
            [each[:, part] for each in (old, x, advantages, mask)],
        ):
            loss, metrics = r1.policy_loss(name)(*given[:3], torch.zeros_like(given[3]), config=actor())
            assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
            assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("name", r1.LOSSES)
def test_what_stands_under_the_mask_does_not_count(verl, name):
    x, old, advantages, mask, _ = responses(4)

    def result(garbage):
        given = [each.masked_fill(~mask, garbage) for each in (old, x, advantages)]
        torch.manual_seed(0)  # clip_cov draws
        loss, metrics = r1.policy_loss(name)(*given, mask, config=actor())
        return loss, metrics, torch.autograd.grad(loss, x)[0]

    expected = result(0.0)
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        loss, metrics, gradient = result(garbage)
        assert loss == expected[0] and metrics == expected[1] and torch.equal(gradient, expected[2])


def test_log_probs_from_hidden_states():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator).requires_grad_()
    weight = torch.randn(13, 8, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(13, (2, 5), generator=generator)
    logp, entropy = r1.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    wide = hidden.detach().double().requires_grad_()
    z = (wide @ weight.detach().double().T / 0.7).log_softmax(-1)
    expected = z.gather(-1, labels.unsqueeze(-1)).view(-1), -(z.exp() * z).sum(-1).view(-1)
    for mine, other in zip((logp, entropy), expected, strict=True):
        assert mine.shape == (10,) and mine.dtype == torch.float32  # one dimension, as verl's
        torch.testing.assert_close(mine, other.float(), rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad(logp.sum() - entropy.sum(), hidden, retain_graph=True)
    (other,) = torch.autograd.grad(expected[0].sum() - expected[1].sum(), wide)
    torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(logp.sum(), weight)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="reduction: expected 'none', got 'mean'"):
        r1.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def test_inside_of_among_both_functions_score_what_a_sampler_kept():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8), torch.randn(11, 8)
    sets = [[1, 4, 7], [2, 9], [], [0, 3, 10, 5], [6, 8], [7]]
    labels = torch.tensor([[4, 2, 5], [10, 8, 7]])
    kept = torch.tensor([token for own in sets for token in own]), torch.tensor([0, 3, 5, 5, 9, 11, 12])
    logits = (hidden @ weight.T).flatten(0, 1) / 0.7
    left = torch.tensor([[not own or token in own for token in range(11)] for own in sets])
    expected = logits.masked_fill(~left, -torch.inf).log_softmax(-1).gather(1, labels.view(-1, 1)).squeeze(1)
    with r1.among(kept):
        logp, _ = r1.linear_cross_entropy(hidden, weight, labels, 0.7)
        of_logits = r1.logprobs_from_logits(logits.view(2, 3, -1), labels)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_logits.flatten(), expected, rtol=1e-5, atol=1e-5)
    whole = logits.log_softmax(-1).gather(1, labels.view(-1, 1)).squeeze(1)
    torch.testing.assert_close(r1.linear_cross_entropy(hidden, weight, labels, 0.7)[0], whole)


def test_log_probs_from_logits():
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(3, 5, 11, generator=generator).requires_grad_()
    labels = torch.randint(11, (3, 5), generator=generator)
    expected = own_logprobs_from_logits(leaf.double(), labels)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    # a leaf, a view of one and a slice keep their logits, others are overwritten by the gradient
    for logits, kept in (
        (leaf, True),
        (leaf.view(3, 5, 11), True),
        ((leaf * 1)[:, :, :], False),
        ((leaf * 1)[:, 1:], True),
    ):
        before = logits.detach().clone()
        chosen = labels if logits.shape[1] == 5 else labels[:, 1:]
        logp = r1.logprobs_from_logits(logits, chosen)
        torch.testing.assert_close(logp, expected[:, -logits.shape[1] :].float(), rtol=1e-5, atol=1e-6)
        (mine,) = torch.autograd.grad(logp.sum(), leaf)
        torch.testing.assert_close(mine[:, 1:], gradient[:, 1:], rtol=1e-4, atol=1e-6)
        assert torch.equal(logits.detach(), before) == kept
    with torch.no_grad():
        torch.testing.assert_close(
            r1.logprobs_from_logits(leaf, labels.int()), expected.float(), rtol=1e-5, atol=1e-6
        )
        hidden, weight = torch.randn(3, 5, 8), torch.randn(11, 8)
        assert torch.equal(
            r1.linear_cross_entropy(hidden, weight, labels.int())[0],
            r1.linear_cross_entropy(hidden, weight, labels)[0],
        )
        for wrong in (labels + 0.5, labels > 3):
            with pytest.raises(TypeError, match="labels: expected dtype int64 or int32, got torch"):
                r1.logprobs_from_logits(leaf, wrong)
            with pytest.raises(TypeError, match="labels: expected dtype int64 or int32, got torch"):
                r1.linear_cross_entropy(hidden, weight, wrong)


def responses(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=generator, dtype=dtype) * 2
    x = (old + torch.randn(B, T, generator=generator, dtype=dtype)).clamp(max=-1e-3).requires_grad_()
    mask = torch.rand(B, T, generator=generator) > 0.3
    mask[1] = False  # a response without a token
    advantages = torch.tensor([1.0, 2.0, -0.5, -1.5], dtype=dtype).unsqueeze(1) * mask
    weights = torch.rand(B, T, generator=generator, dtype=dtype) + 0.5
    return x, old, advantages, mask, weights


def actor(**changes):
    """What the losses read of verl's ActorConfig."""
    chosen = SimpleNamespace(
        clip_cov_ratio=0.2, clip_cov_lb=0.05, clip_cov_ub=5.0, kl_cov_ratio=0.2, ppo_kl_coef=0.7, dro_beta=0.4
    )
    known = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5, "tau_pos": 1.0,
             "tau_neg": 1.05, "global_batch_info": {}, "policy_loss": chosen}  # fmt: skip
    return SimpleNamespace(**{**known, **changes})


INFO = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 10, "loss_scale_factor": 12}


@pytest.mark.parametrize("info", [{}, INFO], ids=["this batch", "whole batch"])
@pytest.mark.parametrize("name", r1.LOSSES)
def test_policy_losses_are_verl_formulas(verl, name, info):
    assert r1.register_policy_losses() == tuple(f"r1kernels_{one}" for one in r1.LOSSES)
    ours, own = verl.registry[f"r1kernels_{name}"], verl.registry[name]
    for seed, mode in enumerate(verl_losses._REDUCTIONS):
        x, old, advantages, mask, weights = responses(seed)
        # the oracle reads a bound that is None as verl does
        config, plain = actor(global_batch_info=info), actor(clip_ratio_low=0.2, global_batch_info=info)
        if name == "gspo":
            weights = weights[:, :1].expand(B, T)
        for correction in (None, weights):
            arguments = {"old_log_prob": old, "log_prob": x, "advantages": advantages, "response_mask": mask,
                         "loss_agg_mode": mode, "rollout_is_weights": correction}  # fmt: skip
            torch.manual_seed(seed)  # clip_cov draws
            loss, metrics = ours(**arguments, config=config)
            torch.manual_seed(seed)
            expected, _ = own(**arguments, config=plain)
            limit = 1e-7 if name in ("dro", "kl_cov") else 1e-12  # the weights of tokens are float32 there
            torch.testing.assert_close(loss, expected, rtol=limit, atol=limit)
            mine, other = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0]
            torch.testing.assert_close(mine, other, rtol=limit, atol=limit)
        if name == "gpg":
            assert metrics == {}
            continue
        drift = (old - x.detach())[mask]
        drift = drift.abs() if name == "kl_cov" else drift
        assert metrics["actor/ppo_kl"] == pytest.approx(float(drift.mean()))
        ratio = (x - old).detach().exp()
        if name in ("kl_cov", "dro"):
            assert set(metrics) == {"actor/ppo_kl"}
        elif name == "clip_cov":
            assert set(metrics) == {"actor/ppo_kl", "actor/pg_clipfrac"}
            assert metrics["actor/pg_clipfrac"] > 0
        elif name.startswith("dppo"):
            far = torch.tensor([[moved_too_far(name, float(x[b, t]), float(old[b, t]), float(advantages[b, t]), plain)
                                 for t in range(T)] for b in range(B)])  # fmt: skip
            assert (
                metrics["actor/pg_clipfrac"] == pytest.approx(float(far[mask].double().mean()))
                and far[mask].any()
            )
            assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(
                float(((ratio > 1.5) & ~far)[mask].double().mean())
            )
        elif name == "cispo":
            outside = (ratio < 0.8) | (ratio > 1.3)
            assert metrics["actor/pg_clipfrac"] == pytest.approx(float(outside[mask].double().mean()))
        elif name == "geo_mean":
            outside = ((x - old < -0.2) | (x - old > 0.3)) & (advantages > 0)
            assert metrics["actor/pg_clipfrac"] == pytest.approx(float(outside[mask].double().mean()))
        if name == "vanilla":
            clipped = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.3) & (advantages > 0))
            assert metrics["actor/pg_clipfrac"] == pytest.approx(float(clipped[mask].double().mean()))
            bound = ((ratio > 1.5) & (advantages < 0))[mask].double().mean()
            assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float(bound)) and bound > 0


def test_what_the_losses_refuse(verl):
    x, old, advantages, mask, _ = responses(0)
    vanilla = r1.policy_loss("vanilla")
    with pytest.raises(ValueError, match="loss_agg_mode: expected one of token-mean, .*, got 'median'"):
        vanilla(old, x, advantages, mask, "median", actor())
    with pytest.raises(ValueError, match="batch_num_tokens: needed with dp_size 2, got None"):
        vanilla(old, x, advantages, mask, "token-mean", actor(global_batch_info={"dp_size": 2}))
    with pytest.raises(ValueError, match="global_batch_info: expected .*, got new_total"):
        vanilla(old, x, advantages, mask, "token-mean", actor(global_batch_info={"new_total": 2}))
    with pytest.raises(ValueError, match="config: expected verl's actor config, got None"):
        vanilla(old, x, advantages, mask)
    with pytest.raises(ValueError, match="rollout_is_weights: expected one number a response with gspo"):
        r1.policy_loss("gspo")(old, x, advantages, mask, config=actor(), rollout_is_weights=torch.rand(B, T))
    without = actor(policy_loss=SimpleNamespace(dro_beta=None))
    with pytest.raises(ValueError, match="dro_beta: expected a number above 0, got 0.0"):
        r1.policy_loss("dro")(old, x, advantages, mask, config=without)
    with pytest.raises(ValueError, match="dual_bound"):
        vanilla(old, x, advantages, mask, "token-mean", actor(clip_ratio_c=0.9))


def test_kl_estimators_are_verl_formulas():
    """verl's kl_penalty: k1, abs, k2, k3 and k3+, by hand in float64, with the derivative in x beside each."""
    x, r, _, mask, _ = responses(7)
    d = (r - x).detach()
    formulas = {
        "k1": (-d, torch.ones_like(d)),
        "abs": (d.abs(), -d.sign()),
        "k2": (d * d / 2, -d),
        "k3": (d.exp() - d - 1, 1 - d.exp()),
        "k3_plus": (d.exp() - d - 1, -d),  # the value of k3, the gradient of k2
    }
    for name, (value, derivative) in formulas.items():
        zero = torch.zeros(B, dtype=torch.float64)
        output = grpo_loss(x, None, zero, mask, ref_logp=r, kl_coef=0.1, kl=name, reduction="token")
        torch.testing.assert_close(output.loss, 0.1 * value[mask].mean(), rtol=1e-12, atol=1e-14)
        (gradient,) = torch.autograd.grad(output.loss, x)
        torch.testing.assert_close(gradient, 0.1 * derivative * mask / mask.sum(), rtol=1e-12, atol=1e-14)
