"""Importance weights, off-policy masks and entropy masks: hand-worked numbers, and torch's own quantile."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1kernels.grpo import grpo_loss, importance_weights, off_policy_mask, top_entropy_mask

LN2 = math.log(2)
# The trainer's log-probs over the sampler's: ratios 2, 1/2, 4, -  and  1/4, (not reported), 2, 1/2
DIFFERENCE = [[LN2, -LN2, 2 * LN2, 50.0], [-2 * LN2, float("nan"), LN2, -LN2]]
MASK = [[1, 1, 1, 0], [1, 1, 1, 1]]


def weights(**options):
    old = torch.full((2, 4), -1.0)
    return importance_weights(old, old - torch.tensor(DIFFERENCE), torch.tensor(MASK), **options)


def test_token_weights():
    truncated = weights(mode="token_truncate", low=0.4, high=3.0)
    assert truncated[0, :3].tolist() == pytest.approx([2.0, 0.5, 3.0])
    assert truncated[1].tolist() == pytest.approx([0.4, 1.0, 2.0, 0.5])
    masked = weights(mode="token_mask", low=0.4, high=3.0)
    assert masked[0, :3].tolist() == pytest.approx([2.0, 0.5, 0.0])
    assert masked[1].tolist() == pytest.approx([0.0, 1.0, 2.0, 0.5])
    assert not truncated.requires_grad and truncated.dtype == torch.float32


def test_sequence_weights_are_products():
    """2 x 1/2 x 4 = 4 and 1/4 x 1 x 2 x 1/2 = 1/4."""
    assert weights(mode="sequence_truncate").tolist() == [[pytest.approx(4.0)], [pytest.approx(0.25)]]
    assert weights(mode="sequence_truncate", low=0.5, high=3.0).tolist() == [
        [pytest.approx(3.0)],
        [pytest.approx(0.5)],
    ]
    assert weights(mode="sequence_mask", high=3.0).tolist() == [[0.0], [pytest.approx(0.25)]]
    assert weights(mode="sequence_mask", low=0.5).tolist() == [[pytest.approx(4.0)], [0.0]]


def test_a_token_that_is_impossible_under_both_is_no_difference():
    """As in grpo_loss: outside of a kept set both log-probs are -inf."""
    old, sampler = torch.tensor([[-1.0, -torch.inf, -2.0]]), torch.tensor([[-2.0, -torch.inf, -4.0]])
    mask, drift = torch.ones(1, 3, dtype=torch.bool), [[1.0, 0.0, 2.0]]
    by_token = importance_weights(old, sampler, mask, mode="token_truncate")
    torch.testing.assert_close(by_token, torch.tensor(drift).exp())
    by_sequence = importance_weights(old, sampler, mask, mode="sequence_mask")
    torch.testing.assert_close(by_sequence, torch.tensor([[3.0]]).exp())
    kept = off_policy_mask(sampler, old, torch.tensor([-1.0]), mask, 0.9)
    assert not kept.item()  # 3 nats over 3 tokens


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_garbage_in_masked_places_changes_no_weight(batch_of, mode):
    batch = batch_of(seed=40)
    options = {"mode": mode, "low": 0.5, "high": 2.0}
    clean = importance_weights(batch.old_logp, batch.sampler_logp, batch.mask, **options)
    for garbage in (float("nan"), float("inf"), -float("inf")):
        old, sampler = (torch.where(batch.mask, v, garbage) for v in (batch.old_logp, batch.sampler_logp))
        assert torch.equal(importance_weights(old, sampler, batch.mask, **options), clean)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_packed_weights_are_the_padded_ones(batch_of, mode):
    batch = batch_of(seed=41)
    padded = importance_weights(batch.old_logp, batch.sampler_logp, batch.mask, mode=mode, high=1.5)
    packed = importance_weights(
        batch.packed(batch.old_logp), batch.packed(batch.sampler_logp), batch.packed(batch.mask), mode=mode, high=1.5,
        cu_seqlens=batch.cu_seqlens(),
    )  # fmt: skip
    torch.testing.assert_close(packed, batch.packed(padded) if mode == "token_truncate" else padded)


def test_off_policy_mask_by_hand():
    """Mean drift s - x: 0.3, 0.3, 0.1 and, with one token not reported, 0.2; only punished sequences are dropped."""
    logp = torch.full((4, 3), -1.0, requires_grad=True)
    drift = torch.tensor([[0.2, 0.4, 9.0], [0.2, 0.4, 0.3], [0.1, 0.1, 0.1], [0.6, float("nan"), 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    keep = off_policy_mask(logp, drift - 1.0, torch.tensor([-1.0, 1.0, -1.0, -1.0]), mask, 0.25)
    assert keep.dtype == torch.bool
    assert keep.tolist() == [[False], [True], [True], [True]]
    assert off_policy_mask(logp, drift - 1.0, torch.tensor([-1.0, 1.0, -1.0, -1.0]), mask, 0.15).tolist() == [
        [False], [True], [True], [False],
    ]  # fmt: skip


def test_off_policy_mask_with_token_advantages_and_packed(batch_of):
    batch = batch_of(seed=42)
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(batch.mask.shape, generator=generator, dtype=torch.float64)
    keep = off_policy_mask(batch.logp, batch.old_logp, advantages, batch.mask, 0.0)
    drift = torch.where(batch.mask, batch.old_logp - batch.logp.detach(), 0).sum(1) / batch.mask.sum(1).clamp(
        min=1
    )
    assert torch.equal(keep, ~((advantages < 0) & (drift > 0).unsqueeze(1)))
    packed = off_policy_mask(
        batch.packed(batch.logp), batch.packed(batch.old_logp), batch.packed(advantages), batch.packed(batch.mask), 0.0,
        cu_seqlens=batch.cu_seqlens(),
    )  # fmt: skip
    assert torch.equal(packed, batch.packed(keep))
    by_sequence = off_policy_mask(
        batch.packed(batch.logp), batch.packed(batch.old_logp), batch.advantages, batch.packed(batch.mask), 0.0,
        cu_seqlens=batch.cu_seqlens(),
    )  # fmt: skip
    assert torch.equal(
        by_sequence, off_policy_mask(batch.logp, batch.old_logp, batch.advantages, batch.mask, 0.0)
    )


def test_a_dropped_sequence_has_no_policy_gradient_but_its_kl(batch_of):
    batch = batch_of(seed=43)
    keep = torch.tensor([[True], [False], [True], [True], [True]])
    keywords = {"ref_logp": batch.ref_logp, "kl_coef": 0.1}
    output = grpo_loss(
        batch.logp, batch.old_logp, batch.advantages, batch.mask, policy_weights=keep, **keywords
    )
    (gradient,) = torch.autograd.grad(output.loss, batch.logp)
    kl_only = grpo_loss(
        batch.logp, batch.old_logp, torch.zeros_like(batch.advantages), batch.mask, **keywords
    )
    (expected,) = torch.autograd.grad(kl_only.loss, batch.logp)
    torch.testing.assert_close(gradient[1], expected[1])
    assert not torch.allclose(gradient[0], expected[0])


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 40),
    quantile=st.sampled_from([0.01, 0.1, 0.2, 0.5, 0.8, 1.0]),
)
def test_top_entropy_mask_is_torchs_quantile(seed, tokens, quantile):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(3, tokens, generator=generator)
    mask = torch.rand(3, tokens, generator=generator) > 0.4
    chosen = top_entropy_mask(torch.where(mask, entropy, float("nan")), mask, quantile)
    assert not chosen[~mask].any()
    if mask.any():
        threshold = torch.quantile(entropy[mask].double(), 1 - quantile)
        clear = mask & ((entropy - threshold).abs() > 1e-6)
        assert torch.equal(chosen[clear], (entropy >= threshold)[clear])
        assert chosen[mask].sum() >= 1
    if quantile == 1.0:
        assert torch.equal(chosen, mask)


def test_top_entropy_mask_by_hand():
    entropy = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.3, 0.0]])
    everything = torch.ones(2, 3, dtype=torch.bool)
    # the 0.7 quantile of 0, 0.1, 0.3, 0.5, 0.7, 0.9 lies half way between 0.5 and 0.7; the 0.6 quantile is 0.5 itself
    assert top_entropy_mask(entropy, everything, 0.3).tolist() == [[False, True, False], [True, False, False]]
    assert top_entropy_mask(entropy, everything, 0.4).tolist() == [[False, True, True], [True, False, False]]
    # ties at the threshold are all kept
    ties = torch.tensor([0.5, 0.5, 0.5, 0.1])
    assert top_entropy_mask(ties, torch.ones(4, dtype=torch.int64), 0.25).tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert top_entropy_mask(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0.5).tolist() == []
    assert not top_entropy_mask(entropy, torch.zeros(2, 3, dtype=torch.bool), 0.5).any()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mode": "truncate"}, ValueError, "mode: expected one of 'token_truncate', 'token_mask'"),
        ({"mode": "token_mask", "low": -1.0}, ValueError, "low: expected at least 0, got -1.0"),
        (
            {"mode": "token_mask", "low": 2.0, "high": 1.0},
            ValueError,
            "low: expected at most high = 1.0, got 2.0",
        ),
        ({"mode": "token_mask", "high": "3"}, TypeError, "high: expected a number, got str"),
    ],
)
def test_bad_modes_and_bounds(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        weights(**options)


@pytest.mark.parametrize("quantile", [0.0, 1.5, -0.2])
def test_bad_quantiles(quantile):
    with pytest.raises(ValueError, match="quantile: expected a number"):
        top_entropy_mask(torch.ones(2), torch.ones(2, dtype=torch.bool), quantile)


def test_bad_shapes():
    two, three, mask = torch.ones(2, 2), torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=re.escape("sampler_logp: expected shape (2, 2), got (2, 3)")):
        importance_weights(two, three, mask, mode="token_mask")
    with pytest.raises(
        ValueError, match=re.escape("advantages: expected shape (2,), (2, 1) or (2, 2), got (3,)")
    ):
        off_policy_mask(two, two, torch.ones(3), mask, 0.1)
