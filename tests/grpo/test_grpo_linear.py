"""linear_grpo_loss is linear_logprobs followed by grpo_loss; the oracle is plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from r1kernels.grpo import grpo_loss, grpo_preset, linear_grpo_loss

PRESETS = ("r1", "grpo", "dapo", "dual_clip", "gspo", "cispo", "sapo", "vespo", "gmpo", "gpg")
VOCABULARY, WIDTH = 23, 6


def head(dtype=torch.float64, seed=0, shape=(5, 9)):
    generator = torch.Generator().manual_seed(seed)

    def noise(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    hidden = noise(*shape, WIDTH).requires_grad_()
    weight, bias = noise(VOCABULARY, WIDTH).requires_grad_(), noise(VOCABULARY).requires_grad_()
    return hidden, weight, bias, torch.randint(0, VOCABULARY, shape, generator=generator)


def plain(hidden, weight, bias, targets, temperature, softcap=None, scale=1.0):
    """Log-probs and entropies by torch's own log_softmax."""
    logits = scale * (hidden @ weight.T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.7, "chunk_size": 4}])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_numbers_of_the_two_ops(batch_of, preset, options):
    batch = batch_of(seed=50)
    hidden, weight, bias, targets = head()
    temperature = 0.8 if options else torch.linspace(0.5, 1.5, 45, dtype=torch.float64).view(5, 9)
    scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")
    logp, entropy = plain(
        hidden, weight, bias, targets, temperature if options else temperature[..., None], softcap, scale
    )
    old = logp.detach() + 0.3 * (batch.old_logp - batch.logp.detach())
    ref = logp.detach() + 0.3 * (batch.ref_logp - batch.logp.detach())
    keywords = {**grpo_preset(preset), "kl_coef": 0.1, "ref_logp": ref, "entropy_coef": 0.05}
    expected = grpo_loss(logp, old, batch.advantages, batch.mask, **{**keywords, "entropy": entropy})
    output = linear_grpo_loss(
        hidden,
        weight,
        targets,
        old,
        batch.advantages,
        batch.mask,
        bias=bias,
        temperature=temperature,
        **options,
        **keywords,
    )
    torch.testing.assert_close(output.loss, expected.loss)
    assert set(output.metrics) == set(expected.metrics)
    torch.testing.assert_close(output.metrics.tensor, expected.metrics.tensor)
    leaves = (hidden, weight, bias)
    for one, other in zip(
        torch.autograd.grad(output.loss, leaves), torch.autograd.grad(expected.loss, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_masked_places_changes_nothing(batch_of, garbage):
    """Hidden states, targets and temperatures where the mask is 0: none of them reaches the loss or a gradient."""
    batch = batch_of(seed=51)
    hidden, weight, bias, targets = head(seed=1)
    temperature = torch.full((5, 9), 0.9, dtype=torch.float64)
    arguments = (batch.old_logp, batch.advantages, batch.mask)
    clean = linear_grpo_loss(
        hidden, weight, targets, *arguments, bias=bias, temperature=temperature, entropy=True
    )
    dirty_hidden = torch.where(batch.mask[..., None], hidden.detach(), garbage).requires_grad_()
    dirty = linear_grpo_loss(
        dirty_hidden, weight, torch.where(batch.mask, targets, -7), *arguments, bias=bias,
        temperature=torch.where(batch.mask, temperature, garbage), entropy=True,
    )  # fmt: skip
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(dirty.metrics.tensor, clean.metrics.tensor)
    gradients = torch.autograd.grad(clean.loss, (hidden, weight, bias))
    for one, other in zip(
        torch.autograd.grad(dirty.loss, (dirty_hidden, weight, bias)), gradients, strict=True
    ):
        assert torch.equal(one, other)


def test_packed_equals_padded(batch_of):
    batch = batch_of(seed=52)
    hidden, weight, _, targets = head(seed=2)
    keywords = {"variant": "sapo", "ratio": "sequence", "entropy": True}
    padded = linear_grpo_loss(
        hidden, weight, targets, batch.old_logp, batch.advantages, batch.mask, **keywords
    )
    packed = linear_grpo_loss(
        batch.packed(hidden), weight, batch.packed(targets), batch.packed(batch.old_logp), batch.advantages,
        batch.packed(batch.mask), cu_seqlens=batch.cu_seqlens(), **keywords,
    )  # fmt: skip
    torch.testing.assert_close(packed.loss, padded.loss)
    torch.testing.assert_close(packed.metrics.tensor, padded.metrics.tensor)
    for one, other in zip(
        torch.autograd.grad(packed.loss, (hidden, weight)),
        torch.autograd.grad(padded.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_batch_without_counted_tokens_gives_zero(batch_of):
    batch = batch_of(seed=53)
    hidden, weight, _, targets = head(seed=3)
    mask = torch.zeros_like(batch.mask)
    output = linear_grpo_loss(hidden, weight, targets, batch.old_logp, batch.advantages, mask)
    assert output.loss.item() == 0
    for gradient in torch.autograd.grad(output.loss, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_on_policy_and_a_frozen_head(batch_of):
    """old_logp=None makes every ratio 1; a head without gradient gets none; under no_grad there is nothing to keep."""
    batch = batch_of(seed=54)
    hidden, weight, _, targets = head(seed=4)
    output = linear_grpo_loss(hidden, weight.detach(), targets, None, batch.advantages, batch.mask)
    assert output.metrics["ratio/max"] == 1
    assert torch.autograd.grad(output.loss, hidden)[0].abs().sum() > 0
    with torch.no_grad():
        same = linear_grpo_loss(hidden, weight, targets, None, batch.advantages, batch.mask)
    assert not same.loss.requires_grad
    torch.testing.assert_close(same.loss, output.loss.detach())


def test_the_upstream_gradient_scales(batch_of):
    batch = batch_of(seed=55)
    hidden, weight, _, targets = head(seed=5)
    loss = linear_grpo_loss(hidden, weight, targets, None, batch.advantages, batch.mask).loss
    one = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    three = torch.autograd.grad(3 * loss, (hidden, weight))
    for single, triple in zip(one, three, strict=True):
        torch.testing.assert_close(3 * single, triple)


def test_bfloat16(batch_of):
    """bf16 states and head: a float32 loss, bf16 gradients, close to float64 on the same rounded numbers."""
    batch = batch_of(seed=56)
    hidden, weight, _, targets = head(torch.bfloat16, seed=6)
    old = torch.full((5, 9), -3.0)
    output = linear_grpo_loss(hidden, weight, targets, old, batch.advantages.float(), batch.mask)
    assert output.loss.dtype == torch.float32
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    expected = linear_grpo_loss(*exact, targets, old.double(), batch.advantages, batch.mask).loss
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(output.loss, (hidden, weight)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-4)
