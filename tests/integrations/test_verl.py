"""The verl adapter, on a stand-in for verl.

verl itself is heavy and not installed. The stand-in has the modules, names and signatures of verl's main branch of 2026-08
(verl.utils.kernel.linear_cross_entropy, verl.utils.torch_functional, verl.trainer.ppo.core_algos); behind them stand
the published formulas, token by token in float64, so it is the oracle too.
"""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import pytest
import torch

from r1kernels.grpo import grpo_loss
from r1kernels.integrations import verl as r1

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


def per_token(name, x, old, advantage, mask, config):
    """The loss of every token as a 0-d tensor with gradient."""
    terms = []
    for b in range(B):
        drift = sum((x[b, t] - old[b, t]) * mask[b, t] for t in range(T)) / max(int(mask[b].sum()), 1)
        row = []
        for t in range(T):
            A = float(advantage[b, t])
            ratio = (x[b, t] - old[b, t]).exp()
            if name == "gspo":  # the ratio of the sequence, its gradient through the token alone
                ratio = drift.detach().exp() * (x[b, t] - x[b, t].detach()).exp()
            if name == "gpg":
                row.append(-A * x[b, t])
            elif name == "sapo":
                tau = config.tau_pos if A > 0 else config.tau_neg
                row.append(-A * 4 / tau / (1 + (-tau * (ratio - 1)).exp()))
            else:
                clipped = min(max(ratio, 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)
                worse = max(-A * ratio, -A * clipped)
                row.append(min(worse, -A * config.clip_ratio_c) if name == "vanilla" and A < 0 else worse)
        terms.append(row)
    return terms


def own_loss(name):
    def loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
             rollout_is_weights=None):  # fmt: skip
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


def responses(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=generator, dtype=dtype) * 2
    x = (old + torch.randn(B, T, generator=generator, dtype=dtype)).requires_grad_()
    mask = torch.rand(B, T, generator=generator) > 0.3
    mask[1] = False  # a response without a token
    advantages = torch.tensor([1.0, 2.0, -0.5, -1.5], dtype=dtype).unsqueeze(1) * mask
    weights = torch.rand(B, T, generator=generator, dtype=dtype) + 0.5
    return x, old, advantages, mask, weights


def actor(**changes):
    """What the losses read of verl's ActorConfig."""
    known = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5, "tau_pos": 1.0,
             "tau_neg": 1.05, "global_batch_info": {}}  # fmt: skip
    return SimpleNamespace(**{**known, **changes})


INFO = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 10, "loss_scale_factor": 12}


@pytest.mark.parametrize("info", [{}, INFO], ids=["this batch", "whole batch"])
@pytest.mark.parametrize("name", r1.LOSSES)
def test_policy_losses_are_verl_formulas(verl, name, info):
    assert r1.register_policy_losses() == tuple(f"r1kernels_{one}" for one in r1.LOSSES)
    ours, own = verl.registry[f"r1kernels_{name}"], verl.registry[name]
    for seed, mode in enumerate(r1._REDUCTIONS):
        x, old, advantages, mask, weights = responses(seed)
        # the oracle reads a bound that is None as verl does
        config, plain = actor(global_batch_info=info), actor(clip_ratio_low=0.2, global_batch_info=info)
        if name == "gspo":
            weights = weights[:, :1].expand(B, T)
        for correction in (None, weights):
            arguments = {"old_log_prob": old, "log_prob": x, "advantages": advantages, "response_mask": mask,
                         "loss_agg_mode": mode, "rollout_is_weights": correction}  # fmt: skip
            loss, metrics = ours(**arguments, config=config)
            expected, _ = own(**arguments, config=plain)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
            mine, other = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0]
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
        if name == "gpg":
            assert metrics == {}
            continue
        assert metrics["actor/ppo_kl"] == pytest.approx(float((old - x.detach())[mask].mean()))
        ratio = (x - old).detach().exp()
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
