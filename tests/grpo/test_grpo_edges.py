"""Edges of grpo_loss: garbage where the mask is 0, empty and fully masked batches, extreme log-probs."""

from __future__ import annotations

import itertools

import pytest
import torch

from r1kernels.grpo import grpo_loss, grpo_preset, reduction_weights
from r1kernels.grpo.metrics import NAMES
from tests.support.grpo_calls import PRESETS, loss_and_gradients, loss_of
from tests.support.grpo_loss_kernel import (
    BOUNDED,
    check_far_reference,
    check_overflow,
    check_unbounded_overflow,
)

GARBAGE = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("preset", ["grpo", "bnpo", "dr_grpo", "cispo", "sapo", "reinforce"])
def test_a_token_that_neither_policy_can_make_has_weight_0(batch_of, preset):
    """-inf minus -inf: as if the mask left it out, but for the weights, which the mask makes."""
    batch = batch_of(seed=21)
    out = batch.mask & (torch.arange(batch.mask.shape[1]) % 3 == 1)
    assert out.any()
    given = grpo_preset(preset) if preset != "reinforce" else {"variant": "reinforce"}
    reduction = given.pop("reduction", "sequence")
    longest = {"max_length": batch.mask.shape[1]} if reduction == "constant" else {}
    given |= {"ref_logp": batch.ref_logp, "kl_coef": 0.1, "entropy_coef": 0.1}
    leaves = [leaf.detach().clone() for leaf in (batch.logp, batch.entropy)]
    leaves[0][out] = -torch.inf
    old = batch.old_logp.masked_fill(out, -torch.inf)
    found = []
    for mask, how in (
        (batch.mask, {"reduction": reduction, **longest}),
        (batch.mask & ~out, {"weights": reduction_weights(batch.mask, reduction, **longest)}),
    ):
        x, h = (leaf.requires_grad_() for leaf in leaves)
        output = grpo_loss(x, old, batch.advantages, mask, entropy=h, **given, **how)
        found.append((output, torch.autograd.grad(output.loss, (x, h))))
    (ours, grads), (expected, wanted) = found
    torch.testing.assert_close(ours.loss, expected.loss)
    assert ours.metrics["num_impossible"] == out.sum() and expected.metrics["num_impossible"] == 0
    for name in set(ours.metrics) - {"num_impossible"}:
        torch.testing.assert_close(ours.metrics[name], expected.metrics[name])
    for mine, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, other)
        assert mine[out].eq(0).all()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_garbage_in_masked_places_changes_nothing(batch_of, preset, unbiased):
    if unbiased and preset == "r1":
        unbiased = None
    kl = {"kl": "unbiased"} if unbiased else {}
    for garbage, weights_by in itertools.product(GARBAGE, ("token", "sequence")):
        clean = batch_of(seed=20)
        generator = torch.Generator().manual_seed(20)
        token_advantages = torch.randn(clean.mask.shape, generator=generator, dtype=torch.float64)
        columns = clean.mask.shape[1] if weights_by == "token" else 1
        weights = torch.rand(clean.mask.shape[0], columns, generator=generator, dtype=torch.float64) + 0.5
        e = torch.rand(clean.mask.shape, generator=generator, dtype=torch.float64)
        empty = ~clean.mask.any(1, keepdim=True)

        def spoil(values, garbage=garbage, clean=clean, empty=empty):
            where = ~clean.mask if values.shape == clean.mask.shape else empty.expand(values.shape)
            return torch.where(where, garbage, values.detach())

        dirty = clean._replace(
            logp=spoil(clean.logp).requires_grad_(),
            old_logp=spoil(clean.old_logp),
            ref_logp=spoil(clean.ref_logp),
            entropy=spoil(clean.entropy).requires_grad_(),
        )
        for advantages in (clean.advantages, token_advantages):
            spoiled = spoil(advantages.unsqueeze(1)).squeeze(1) if advantages.ndim == 1 else spoil(advantages)
            options = {"policy_weights": weights, "entropy_weights": e, **kl}
            expected, gradients = loss_and_gradients(clean._replace(advantages=advantages), preset, **options)
            options = {"policy_weights": spoil(weights), "entropy_weights": spoil(e), **kl}
            output, dirty_gradients = loss_and_gradients(
                dirty._replace(advantages=spoiled), preset, **options
            )
            assert torch.equal(output.loss, expected.loss)
            assert torch.equal(output.metrics.tensor, expected.metrics.tensor)
            for one, other in zip(dirty_gradients, gradients, strict=True):
                assert torch.equal(one, other)
                assert torch.equal(one[~clean.mask], torch.zeros_like(one[~clean.mask]))


def test_garbage_in_masked_explicit_weights_changes_nothing(batch_of):
    batch = batch_of(seed=21)
    w = torch.rand(batch.mask.shape, dtype=torch.float64)
    clean = loss_of(batch, weights=w).loss
    dirty = torch.where(batch.mask, w, float("nan"))
    spoiled = loss_of(batch, weights=dirty).loss
    assert torch.equal(clean, spoiled)
    assert torch.equal(torch.autograd.grad(clean, batch.logp)[0], torch.autograd.grad(spoiled, batch.logp)[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_without_counted_tokens_gives_zero(batch_of, preset, packed):
    batch = batch_of(seed=22, dtype=torch.float32)
    mask = torch.zeros_like(batch.mask)
    batch = batch._replace(mask=mask, logp=torch.full_like(batch.logp, float("nan")).requires_grad_())
    changes = {}
    if packed:
        flat = {
            name: getattr(batch, name).detach().flatten()
            for name in ("logp", "old_logp", "ref_logp", "entropy", "mask")
        }
        flat["logp"].requires_grad_()
        flat["entropy"].requires_grad_()
        batch = batch._replace(**flat)
        changes["cu_seqlens"] = torch.tensor([0, 3, 3, 20, 21, 45], dtype=torch.int64)
    output, gradients = loss_and_gradients(batch, preset, **changes)
    assert output.loss.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert torch.equal(output.metrics.tensor, torch.zeros(len(NAMES)))


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0, 0), (1, 1)])
@pytest.mark.parametrize("preset", PRESETS)
def test_empty_shapes(batch_of, preset, shape):
    batch = batch_of(seed=23, num_sequences=shape[0], num_tokens=shape[1], dtype=torch.float32)
    output, (gradient, _) = loss_and_gradients(batch, preset)
    assert gradient.shape == shape
    assert torch.isfinite(output.loss)
    assert output.metrics["num_tokens"] == batch.mask.sum()
    if 0 in shape:
        assert output.loss.item() == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_empty_packed(preset):
    logp = torch.zeros(0, requires_grad=True)
    for boundaries in ([0], [0, 0], [0, 0, 0]):
        output = grpo_loss(
            logp, torch.zeros(0), torch.ones(len(boundaries) - 1), torch.zeros(0, dtype=torch.bool),
            **{**grpo_preset(preset), "kl_coef": 0.0, "kl": None}, cu_seqlens=torch.tensor(boundaries),
        )  # fmt: skip
        assert output.loss.item() == 0
        assert torch.autograd.grad(output.loss, logp)[0].shape == (0,)


def test_nan_in_a_counted_place_is_not_hidden(batch_of):
    """Only masked places are forgiven: elsewhere a NaN shows, in every variant."""
    for preset in PRESETS:
        batch = batch_of(seed=24)
        logp = batch.logp.detach().clone()
        logp[0, 0] = float("nan")
        output, _ = loss_and_gradients(batch._replace(logp=logp.requires_grad_()), preset)
        assert output.loss.isnan(), preset


def test_vespo_drops_a_sequence_whose_weight_is_not_a_number(batch_of):
    batch = batch_of(seed=25)
    weights = torch.ones(5, 1, dtype=torch.float64)
    weights[1] = -1.0
    output = loss_of(batch, variant="vespo", policy_weights=weights)
    (gradient,) = torch.autograd.grad(output.loss, batch.logp)
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert gradient[0].abs().sum() > 0


def test_extreme_log_probs_stay_finite():
    """A token that became impossible (log-prob -200) or certain under the policy, clipped where it must be."""
    logp = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-0.1, -80.0]])
    for preset, advantage in itertools.product(
        ("r1", "grpo", "gspo", "cispo", "sapo", "vespo", "gmpo"), (1.0, -1.0)
    ):
        if (preset, advantage) == ("grpo", -1.0):
            continue  # unbounded by design: the ratio e^80 of a punished token (dual_clip bounds it)
        keywords = {**grpo_preset(preset), "kl_coef": 0.0, "kl": None}
        loss = grpo_loss(
            logp, old, torch.tensor([advantage]), torch.ones(1, 2, dtype=torch.bool), **keywords
        ).loss
        assert torch.isfinite(loss), preset
        assert torch.isfinite(torch.autograd.grad(loss, logp)[0]).all(), preset


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(("variant", "signs"), BOUNDED)
def test_ratios_that_overflow(variant, signs, ratio):
    check_overflow(of_reference, variant, signs, ratio)


def of_reference(*values, **options):
    return grpo_loss(*values, **options, backend="reference")


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_an_overflow_that_nothing_bounds_is_infinite(ratio):
    check_unbounded_overflow(of_reference, ratio)


def test_the_unbiased_kl_far_from_the_reference():
    check_far_reference(of_reference)


def test_the_gradient_at_the_edges_of_the_clip():
    """At exactly 1 + high the unclipped branch still counts, above it does not: clip 0, ratios 1, 1 + and 1 -."""
    logp = torch.tensor([[0.0, 1e-9, -1e-9]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros_like(logp.detach()), torch.ones(1, 3, dtype=torch.bool)
    for advantage, expected in ((3.0, [-1.0, 0.0, -1.0]), (-3.0, [1.0, 1.0, 0.0])):
        advantages = torch.tensor([advantage], dtype=torch.float64)
        loss = grpo_loss(logp, old, advantages, mask, clip_low=0.0, clip_high=0.0).loss
        assert torch.autograd.grad(loss, logp)[0][0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("strided", ["transposed", "sliced"])
def test_any_strides(batch_of, strided):
    batch = batch_of(seed=26)

    def restride(values):
        if strided == "transposed":
            return values.t().contiguous().t()
        return torch.stack((values, values), -1).flatten(1)[:, ::2]

    expected = loss_of(batch).loss
    loss = grpo_loss(
        restride(batch.logp),
        restride(batch.old_logp),
        batch.advantages[:, None].expand(5, 9),
        restride(batch.mask),
    ).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, batch.logp)[0], torch.autograd.grad(expected, batch.logp)[0]
    )
