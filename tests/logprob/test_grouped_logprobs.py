"""grouped_logprobs: sums, means and token values of completions. B completions, G a prompt, T tokens, V vocabulary."""

from __future__ import annotations

import pytest
import torch

from r1kernels import grouped_logprobs, linear_grouped_logprobs, token_logprobs

LENGTHS = (3, 0, 5, 1)


def padded(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 9, dtype=torch.float64, generator=generator).to(dtype)
    targets = torch.randint(0, 9, (4, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return logits, targets, mask


def by_hand(logits, targets, mask, reduce):
    """A loop over the completions."""
    rows = []
    for z, y, m in zip(logits, targets, mask, strict=True):
        logp, entropy = token_logprobs(z[m], y[m], return_entropy=True)
        divisor = max(int(m.sum()), 1) if reduce == "mean" else 1
        rows.append((logp.sum() / divisor, entropy.sum() / divisor))
    return (torch.stack([row[column] for row in rows]).view(2, 2) for column in range(2))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_reduced_values_and_gradients(reduce, layout):
    logits, targets, mask = padded()
    z = logits.clone().requires_grad_()
    if layout == "padded":
        result = grouped_logprobs(z, targets, mask=mask, group_size=2, reduce=reduce, return_entropy=True)
    else:
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
        result = grouped_logprobs(
            z[mask], targets[mask], cu_seqlens=bounds, group_size=2, reduce=reduce, return_entropy=True
        )
    plain = logits.clone().requires_grad_()
    logp, entropy = by_hand(plain, targets, mask, reduce)
    torch.testing.assert_close(result.logp, logp)
    torch.testing.assert_close(result.entropy, entropy)
    assert result.counts.tolist() == [[3, 0], [5, 1]] and result.counts.dtype == torch.int64
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    (grad,) = torch.autograd.grad((result.logp * weights - result.entropy * weights).sum(), z)
    (expected,) = torch.autograd.grad((logp * weights - entropy * weights).sum(), plain)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_token_values_keep_the_shape_of_the_targets(layout):
    logits, targets, mask = padded()
    full = token_logprobs(logits, targets)
    if layout == "padded":
        result = grouped_logprobs(logits, targets, mask=mask, group_size=4, reduce="none")
        torch.testing.assert_close(result.logp, torch.where(mask, full, 0.0))
    else:
        bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).int()
        result = grouped_logprobs(logits[mask], targets[mask], cu_seqlens=bounds, group_size=4, reduce="none")
        torch.testing.assert_close(result.logp, full[mask])
    assert result.entropy is None and result.counts.tolist() == [list(LENGTHS)]


def test_garbage_in_masked_places_changes_nothing():
    logits, targets, mask = padded(torch.float32)
    dirty = logits.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    wild = targets.masked_fill(~mask, 10**9)
    clean = grouped_logprobs(logits, targets, mask=mask, group_size=2, return_entropy=True)
    result = grouped_logprobs(dirty, wild, mask=mask.int(), group_size=2, return_entropy=True)
    assert torch.equal(result.logp, clean.logp) and torch.equal(result.entropy, clean.entropy)
    result.logp.sum().backward()
    assert torch.isfinite(dirty.grad).all() and (dirty.grad[~mask] == 0).all()


@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
def test_from_hidden_states_it_is_the_same(reduce):
    _, targets, mask = padded()
    hidden = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    options = {"mask": mask, "group_size": 2, "reduce": reduce, "return_entropy": True, "temperature": 0.8}
    ours = linear_grouped_logprobs(hidden, weight, targets, chunk_size=3, **options)
    plain = grouped_logprobs(hidden @ weight.T, targets, **options)
    torch.testing.assert_close(ours, plain)
    grads = [
        torch.autograd.grad(r.logp.sum() + r.entropy.sum(), (hidden, weight), retain_graph=True)
        for r in (ours, plain)
    ]
    torch.testing.assert_close(*grads)
    grouped, stats = linear_grouped_logprobs(hidden, weight, targets, stats=("is_top1",), **options)
    assert torch.equal(grouped.counts, ours.counts) and stats["is_top1"].shape == targets.shape


def test_an_ignored_target_does_not_count():
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    targets = torch.tensor([[1, -100, 2], [0, 0, -100]])
    result = linear_grouped_logprobs(hidden, weight, targets, group_size=2, reduce="mean")
    assert result.counts.tolist() == [[2, 2]]


def test_it_compiles_in_one_graph():
    logits, targets, mask = padded(torch.float32)
    function = torch.compile(
        lambda z: grouped_logprobs(z, targets, mask=mask, group_size=2, reduce="mean").logp,
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(
        function(logits), grouped_logprobs(logits, targets, mask=mask, group_size=2, reduce="mean").logp
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"group_size": 3}, ValueError, "group_size: expected a divisor of the 4 completions, got 3"),
        ({"group_size": 0}, ValueError, "group_size: expected at least 1"),
        ({"reduce": "max"}, ValueError, "reduce: expected one of 'sum', 'mean', 'none', got 'max'"),
        ({"mask": torch.ones(4, 4)}, ValueError, r"mask: expected shape \(4, 5\), got \(4, 4\)"),
        (
            {"targets": torch.full((4, 5), 9)},
            IndexError,
            r"targets: expected values in \[0, 9\), got 9 at position \(0, 0\)",
        ),
        ({"targets": torch.full((4, 5), -100)}, IndexError, r"got -100 at position \(0, 0\)"),
        ({"cu_seqlens": torch.tensor([0, 20])}, ValueError, "logits: expected 2 dimensions"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    logits, targets, _ = padded()
    with pytest.raises(error, match=text):
        grouped_logprobs(**({"logits": logits, "targets": targets, "group_size": 2} | change))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 3, 2, 4], []])
def test_bounds_that_do_not_cover_the_tokens_are_named(bounds):
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        grouped_logprobs(
            torch.zeros(4, 3),
            torch.zeros(4, dtype=torch.int64),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int64),
            group_size=1,
        )
