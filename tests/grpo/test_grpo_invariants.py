"""What must not change the loss: the order of tokens and sequences, the layout, and the way a batch is cut up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1kernels.grpo import grpo_loss, reduction_weights
from tests.support.grpo_calls import PRESETS, gradients_of, keywords_of, loss_and_gradients, loss_of

REDUCTIONS = ("sequence", "token", "constant", "sequence-sum")
quick = settings(max_examples=8, deadline=None)
shapes = {"seed": st.integers(0, 10_000), "sequences": st.integers(1, 6), "tokens": st.integers(0, 11)}


def reordered(batch, sequences, tokens):
    """The batch with its sequences, and the tokens of each, in another order."""

    def move(values):
        return values[sequences].gather(1, tokens[sequences])

    leaves = {name: move(getattr(batch, name).detach()).requires_grad_() for name in ("logp", "entropy")}
    rest = {name: move(getattr(batch, name)) for name in ("old_logp", "ref_logp", "sampler_logp", "mask")}
    return batch._replace(**leaves, **rest, advantages=batch.advantages[sequences]), move


@pytest.mark.parametrize("preset", PRESETS)
@quick
@given(**shapes)
def test_order_does_not_matter(batch_of, preset, seed, sequences, tokens):
    batch = batch_of(seed, sequences, tokens)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sequences, generator=generator)
    within = torch.rand(sequences, tokens, generator=generator).argsort(1)
    other, move = reordered(batch, order, within)
    output, gradients = loss_and_gradients(batch, preset)
    moved, moved_gradients = loss_and_gradients(other, preset)
    torch.testing.assert_close(moved.loss, output.loss)
    for one, gradient in zip(moved_gradients, gradients, strict=True):
        torch.testing.assert_close(one, move(gradient))
    torch.testing.assert_close(moved.metrics.tensor, output.metrics.tensor)


@pytest.mark.parametrize("preset", PRESETS)
@quick
@given(**shapes, weighting=st.sampled_from(["none", "token", "sequence"]), token_advantages=st.booleans())
def test_packed_equals_padded(batch_of, preset, seed, sequences, tokens, weighting, token_advantages):
    batch = batch_of(seed, sequences, tokens)
    lengths, cu_seqlens = batch.lengths(), batch.cu_seqlens()
    padded = keywords_of(preset, batch)
    generator = torch.Generator().manual_seed(seed)
    advantages = batch.advantages
    if token_advantages and int(lengths.sum()) != sequences:
        advantages = torch.randn(batch.mask.shape, generator=generator, dtype=torch.float64)
    if weighting != "none":
        columns = tokens if weighting == "token" else 1
        padded["policy_weights"] = (
            torch.rand(sequences, columns, generator=generator, dtype=torch.float64) + 0.1
        )
    packed = {name: batch.packed(v) if name in ("ref_logp", "entropy") else v for name, v in padded.items()}
    if weighting == "token":
        packed["policy_weights"] = batch.packed(padded["policy_weights"])
    logp = batch.packed(batch.logp)
    expected = grpo_loss(batch.logp, batch.old_logp, advantages, batch.mask, **padded)
    output = grpo_loss(
        logp,
        batch.packed(batch.old_logp),
        advantages if advantages.ndim == 1 else batch.packed(advantages),
        batch.packed(batch.mask),
        **packed,
        cu_seqlens=cu_seqlens,
    )
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.metrics.tensor, expected.metrics.tensor)
    for one, other in zip(gradients_of(output.loss, batch), gradients_of(expected.loss, batch), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@quick
@given(**shapes)
def test_packed_weights_equal_padded_ones(batch_of, reduction, seed, sequences, tokens):
    batch = batch_of(seed, sequences, tokens)
    longest = {"max_length": tokens + 1} if reduction == "constant" else {}
    padded = reduction_weights(batch.mask, reduction, **longest)
    packed = reduction_weights(batch.packed(batch.mask), reduction, cu_seqlens=batch.cu_seqlens(), **longest)
    torch.testing.assert_close(packed, batch.packed(padded))


@pytest.mark.parametrize("preset", PRESETS)
@quick
@given(**shapes, padding=st.integers(1, 5))
def test_padding_does_not_matter(batch_of, preset, seed, sequences, tokens, padding):
    """More padding on the right, full of NaN, changes neither loss nor metrics (max_length is given where it counts)."""
    batch = batch_of(seed, sequences, tokens)

    def widen(values, fill):
        return torch.nn.functional.pad(values.detach(), (0, padding), value=fill)

    wide = batch._replace(
        logp=widen(batch.logp, float("nan")).requires_grad_(),
        entropy=widen(batch.entropy, float("inf")).requires_grad_(),
        old_logp=widen(batch.old_logp, float("-inf")),
        ref_logp=widen(batch.ref_logp, float("nan")),
        mask=widen(batch.mask, False),
    )
    output, gradients = loss_and_gradients(batch, preset)
    wider, wide_gradients = loss_and_gradients(wide, preset)
    torch.testing.assert_close(wider.loss, output.loss)
    torch.testing.assert_close(wider.metrics.tensor, output.metrics.tensor)
    for one, gradient in zip(wide_gradients, gradients, strict=True):
        torch.testing.assert_close(one, widen(gradient, 0.0))


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_is_linear_in_its_coefficients(batch_of, preset):
    """The policy term scales with the policy weights, and the KL with its coefficient; neither touches the other."""
    batch = batch_of(seed=6)
    base = loss_of(batch, **keywords_of(preset, batch))
    policy = base.metrics["policy_loss"]
    bonus = 0.05 * (reduction(preset, batch) * batch.entropy.detach()).sum()
    kl = (base.loss.detach() - policy + bonus) / 0.1
    for coef in (0.0, 0.7):
        changed, _ = loss_and_gradients(batch, preset, kl_coef=coef)
        torch.testing.assert_close(changed.loss.detach(), policy + coef * kl - bonus)
    if preset != "vespo":
        halves = torch.full_like(batch.ref_logp, 0.5)
        halved, _ = loss_and_gradients(batch, preset, policy_weights=halves)
        torch.testing.assert_close(halved.loss.detach(), policy / 2 + 0.1 * kl - bonus)


def reduction(preset, batch):
    keywords = keywords_of(preset, batch)
    longest = {"max_length": keywords["max_length"]} if "max_length" in keywords else {}
    return reduction_weights(batch.mask, keywords["reduction"], **longest).double()


def part(batch, rows):
    """Some sequences of a batch, with the same leaves."""
    return batch._replace(**{name: value[rows] for name, value in batch._asdict().items()})


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_with_totals_are_one_batch(batch_of, preset, as_tensor):
    batch = batch_of(seed=8, num_sequences=7)
    whole, gradients = loss_and_gradients(batch, preset)
    keywords = keywords_of(preset, batch)
    totals = (
        {"num_tokens": int(batch.mask.sum())} if keywords["reduction"] == "token" else {"num_sequences": 7}
    )
    if as_tensor:
        totals = {name: torch.tensor(value) for name, value in totals.items()}
    losses = []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
        piece = part(batch, rows)
        losses.append(loss_of(piece, **{**keywords_of(preset, piece), **totals}).loss)
    torch.testing.assert_close(sum(losses), whole.loss)
    summed = gradients_of(sum(losses), batch)
    for one, other in zip(summed, gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "luspo", "r1"])
def test_without_totals_equal_micro_batches_count_as_often_as_there_are(batch_of, preset):
    batch = batch_of(seed=12, num_sequences=8)
    _, (gradient, _) = loss_and_gradients(batch, preset)
    total = torch.zeros_like(gradient)
    for start in range(0, 8, 2):
        piece = part(batch, slice(start, start + 2))
        loss = loss_of(piece, **keywords_of(preset, piece)).loss
        total += torch.autograd.grad(loss, batch.logp)[0]
    torch.testing.assert_close(total, 4 * gradient)


@pytest.mark.parametrize("preset", PRESETS)
def test_averaged_ranks_with_totals_over_the_world_size_are_one_batch(batch_of, preset):
    batch = batch_of(seed=13, num_sequences=6)
    _, gradients = loss_and_gradients(batch, preset)
    keywords = keywords_of(preset, batch)
    world = 2
    totals = (
        {"num_tokens": batch.mask.sum() / world}
        if keywords["reduction"] == "token"
        else {"num_sequences": 6 / world}
    )
    averaged = [torch.zeros_like(gradient) for gradient in gradients]
    for rows in (slice(0, 4), slice(4, 6)):
        piece = part(batch, rows)
        loss = loss_of(piece, **{**keywords_of(preset, piece), **totals}).loss
        for mean, gradient in zip(averaged, gradients_of(loss, batch), strict=True):
            mean += gradient / world
    for mean, gradient in zip(averaged, gradients, strict=True):
        torch.testing.assert_close(mean, gradient)


def test_on_policy_without_old_log_probs(batch_of):
    """old_logp=None is the on-policy call: ratio 1, and the gradient of the plain policy gradient."""
    batch = batch_of(seed=14)
    output = grpo_loss(batch.logp, None, batch.advantages, batch.mask)
    plain = grpo_loss(batch.logp, None, batch.advantages, batch.mask, variant="reinforce")
    assert output.metrics["ratio/max"] == 1
    assert output.metrics["ess"] == pytest.approx(1)
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, batch.logp), torch.autograd.grad(plain.loss, batch.logp)
    )


def test_only_log_probs_and_entropy_get_a_gradient(batch_of):
    batch = batch_of(seed=15)
    others = [batch.old_logp, batch.ref_logp, batch.advantages, torch.rand_like(batch.ref_logp)]
    others = [value.clone().requires_grad_() for value in others]
    old, ref, advantages, weights = others
    loss = grpo_loss(
        batch.logp, old, advantages, batch.mask, ref_logp=ref, kl_coef=0.1, policy_weights=weights
    ).loss
    assert all(
        gradient is None
        for gradient in torch.autograd.grad(loss, others, allow_unused=True, retain_graph=True)
    )
    assert torch.autograd.grad(loss, batch.logp)[0].abs().sum() > 0


@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_agree_bit_for_bit(batch_of, packed):
    batch = batch_of(seed=16, num_sequences=40, num_tokens=60, dtype=torch.float32)
    results = []
    for _ in range(2):
        if packed:
            loss = grpo_loss(
                batch.packed(batch.logp), batch.packed(batch.old_logp), batch.advantages, batch.packed(batch.mask),
                ratio="sequence", cu_seqlens=batch.cu_seqlens(),
            ).loss  # fmt: skip
        else:
            loss = loss_of(batch, ratio="sequence").loss
        results.append((loss, torch.autograd.grad(loss, batch.logp)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
