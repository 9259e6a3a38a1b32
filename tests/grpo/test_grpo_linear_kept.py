"""linear_grpo_loss with kept sets: the loss of the policy that a truncated sampler draws from. H hidden, V vocabulary."""

from __future__ import annotations

import pytest
import torch

from r1kernels import debug_checks, extension, grpo_loss, linear_grpo_loss
from tests.support.kept_case import IGNORED, in_csr, of_sets, sets_around

B, T, H, V = 4, 6, 7, 43
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(extension.missing() is not None, reason="no extension")),
]


def problem():
    """((hidden, weight, bias), targets, mask, sets): two counted targets lie outside their sets."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(size, generator=generator) for size in ((B, T, H), (V, H), (V,))]
    targets = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) > 0.3
    lengths = [(0, 3, 9, 1, 20)[n % 5] for n in range(B * T)]
    sets = sets_around(targets, lengths, V)
    outside = [n for n in mask.flatten().nonzero().squeeze(1).tolist() if len(sets[n]) > 2][:2]
    for n in outside:
        sets[n].remove(int(targets.flatten()[n]))
    return leaves, targets, mask, sets, torch.tensor(outside)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"ratio": "sequence"}, {"variant": "gmpo"}], ids=str)
def test_it_is_the_loss_of_log_probs_over_the_sets(backend, options):
    """Against float64 log-probs by torch's log_softmax, set by set, under grpo_loss."""
    leaves, targets, mask, sets, outside = problem()
    old = torch.where(mask, -2.0, torch.nan)
    old.view(-1)[outside] = -torch.inf
    reference = torch.where(mask, -2.5, 0.0)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "temperature": 1.2, **options}
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    dirty = inputs[0].masked_fill(~mask.unsqueeze(-1), torch.nan)
    ours = linear_grpo_loss(
        dirty,
        inputs[1],
        targets,
        old,
        advantages,
        mask,
        bias=inputs[2],
        ref_logp=reference,
        kept=in_csr(sets),
        backend=backend,
        **options,
    )
    grads = torch.autograd.grad(ours.loss, inputs)

    x, w, b = (leaf.double().requires_grad_() for leaf in leaves)
    counted = torch.where(mask, targets, IGNORED)
    logits = (x @ w.T + b).flatten(0, 1)
    logp, entropy, _ = of_sets(logits, sets, counted, options.pop("temperature"))
    given = (value.double().view(B, T) for value in (old, reference))
    old, reference = given
    expected = grpo_loss(
        logp.view(B, T),
        old,
        advantages.double(),
        mask,
        ref_logp=reference,
        entropy=entropy.view(B, T),
        backend="reference",
        **options,
    )
    assert ours.metrics["num_impossible"] == len(outside) > 0
    for name in expected.metrics:
        torch.testing.assert_close(
            ours.metrics[name].double(), expected.metrics[name], rtol=1e-4, atol=1e-6, msg=name
        )
    wanted = torch.autograd.grad(expected.loss, (x, w, b))
    for mine, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_every_ratio_is_1(backend):
    leaves, targets, mask, sets, outside = problem()
    output = linear_grpo_loss(
        *leaves[:2], targets, None, torch.ones(B), mask, kept=in_csr(sets), backend=backend
    )
    assert output.metrics["ratio/max"] == output.metrics["ratio/mean"] == 1
    assert output.metrics["num_tokens"] == mask.sum() - len(outside)


def test_broken_sets_are_clear_errors():
    leaves, targets, mask, sets, outside = problem()
    ids, offsets = in_csr(sets)
    call = (*leaves[:2], targets, None, torch.ones(B), mask)
    with pytest.raises(ValueError, match=r"kept offsets: expected shape \(25\), got \(24,\)"):
        linear_grpo_loss(*call, kept=(ids, offsets[:-1]))
    debug_checks(True)
    try:
        with pytest.raises(ValueError, match=f"targets: .* at position {int(outside[0])}"):
            linear_grpo_loss(*call, kept=(ids, offsets))
    finally:
        debug_checks(False)
