"""The metrics of grpo_loss: hand-worked numbers, which names a call shows, and that they are views of one tensor."""

from __future__ import annotations

import math

import pytest
import torch

from r1kernels.grpo import grpo_loss

# Three tokens with ratios 2, 1/2, 1 and a masked one; then one token with ratio 3/2.
RATIO = [[2.0, 0.5, 1.0, 9.0], [1.5, 9.0, 9.0, 9.0]]
MASK = [[1, 1, 1, 0], [1, 0, 0, 0]]


def metrics_of(**keywords):
    old = torch.full((2, 4), -1.0, dtype=torch.float64)
    logp = (old + torch.tensor(RATIO, dtype=torch.float64).log()).requires_grad_()
    advantages = torch.tensor([1.0, -2.0], dtype=torch.float64)
    return grpo_loss(logp, old, advantages, torch.tensor(MASK), **keywords)


def test_token_level_by_hand():
    output = metrics_of(reduction="token")
    metrics = output.metrics.floats()
    # terms: -min(2, 1.2) = -1.2; -min(0.5, 0.8) = -0.5; -1; and -min(-3, -2.4) = 3
    assert metrics["loss"] == pytest.approx((-1.2 - 0.5 - 1 + 3) / 4)
    assert metrics["policy_loss"] == metrics["loss"] == pytest.approx(output.loss.item())
    assert metrics["ratio/mean"] == pytest.approx(5 / 4)
    assert metrics["ratio/max"] == pytest.approx(2)
    # only the first token is above 1.2 with A > 0; 1/2 is below 0.8, but A > 0 there; 3/2 is above, but A < 0
    assert metrics["clip_ratio/high_mean"] == pytest.approx(1 / 4)
    assert metrics["clip_ratio/low_mean"] == 0
    assert metrics["clip_ratio/region_mean"] == pytest.approx(1 / 4)
    assert metrics["approx_kl"] == pytest.approx(-(math.log(2) - math.log(2) + 0 + math.log(1.5)) / 4)
    assert metrics["ess"] == pytest.approx(5**2 / (4 * (4 + 1 / 4 + 1 + 9 / 4)))
    assert metrics["num_tokens"] == 4


def test_a_sequence_counts_once_where_the_ratio_is_that_of_a_sequence():
    metrics = metrics_of(ratio="sequence").metrics.floats()
    # the geometric means of 2, 1/2, 1 and of 3/2
    assert metrics["ratio/mean"] == pytest.approx((1 + 1.5) / 2)
    assert metrics["ratio/max"] == pytest.approx(1.5)
    assert metrics["ess"] == pytest.approx(2.5**2 / (2 * (1 + 9 / 4)))
    assert metrics["approx_kl"] == pytest.approx(-math.log(1.5) / 4)
    output = metrics_of(ratio="output", ref_logp=torch.full((2, 4), -1.0), kl_coef=0.0).metrics.floats()
    # log-ratios to the reference: 0 and -ln(3/2), so k3 is 0 and 2/3 + ln(3/2) - 1
    assert output["kl"] == pytest.approx((2 / 3 + math.log(1.5) - 1) / 2)


def test_loss_is_made_of_its_parts():
    ref, entropy = torch.full((2, 4), -1.1, dtype=torch.float64), torch.full((2, 4), 0.5, dtype=torch.float64)
    output = metrics_of(reduction="token", ref_logp=ref, kl_coef=0.1, entropy=entropy, entropy_coef=0.01)
    metrics = output.metrics.floats()
    assert metrics["entropy"] == pytest.approx(0.5)
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + 0.1 * metrics["kl"] - 0.01 * 0.5)


@pytest.mark.parametrize("variant", ["grpo", "dual_clip", "cispo", "gmpo", "sapo", "vespo", "reinforce"])
def test_names(variant):
    """kl and entropy are shown where they were measured, the clip ratios where there is a clip."""
    always = {
        "loss",
        "policy_loss",
        "ratio/mean",
        "ratio/max",
        "approx_kl",
        "ess",
        "num_tokens",
        "num_impossible",
    }
    clips = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    clips = clips if variant in ("grpo", "dual_clip", "cispo", "gmpo") else set()
    assert set(metrics_of(variant=variant).metrics) == always | clips
    entropy = torch.ones(2, 4)
    both = metrics_of(variant=variant, ref_logp=entropy, entropy=entropy).metrics
    assert set(both) == always | clips | {"kl", "entropy"}
    assert "kl" in repr(both)


def test_views_of_one_tensor_without_gradient():
    metrics = metrics_of().metrics
    assert metrics.tensor.ndim == 1 and not metrics.tensor.requires_grad
    for value in metrics.values():
        assert value.ndim == 0
        assert value.untyped_storage().data_ptr() == metrics.tensor.untyped_storage().data_ptr()
    assert len(metrics) == len(list(metrics))
    with pytest.raises(KeyError):
        metrics["entropy"]


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3", "k3_plus", "unbiased"])
def test_kl_is_the_mean_of_the_estimator(kl):
    ref = torch.full((2, 4), -1.25, dtype=torch.float64)
    metrics = metrics_of(ref_logp=ref, kl=kl).metrics.floats()
    values = []
    for c in (2.0, 0.5, 1.0, 1.5):
        d = -0.25 - math.log(c)
        k3 = math.exp(d) - d - 1
        values.append(
            {"k1": -d, "abs": abs(d), "k2": d * d / 2, "k3": k3, "k3_plus": k3, "unbiased": c * k3}[kl]
        )
    assert metrics["kl"] == pytest.approx(sum(values) / 4)


def test_gmpo_counts_the_clips_of_its_log_ratio():
    metrics = metrics_of(variant="gmpo", clip_low=0.4, clip_high=0.4).metrics.floats()
    # ln 2 is above 0.4 with A > 0; ln 1.5 too, but with A < 0
    assert metrics["clip_ratio/high_mean"] == pytest.approx(1 / 4)
    assert metrics["clip_ratio/low_mean"] == 0
