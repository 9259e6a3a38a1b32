"""grouped_logprobs and linear_grouped_logprobs on every backend: sums, means and token values of completions.

B completions, G a prompt, T tokens, N packed tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1kernels import grouped_logprobs, linear_grouped_logprobs
from tests.support import linear_oracle as oracle
from tests.support.numerics import same_bits

OP = "grouped_logprobs"
LENGTHS = (3, 0, 5, 1)
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)


def padded(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 9, generator=generator).to(device, dtype)
    targets = torch.randint(0, 9, (4, 5), generator=generator).to(device)
    mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).to(device)
    return logits, targets, mask


def by_hand(logits, targets, mask, reduce, temperature=0.8):
    """A loop over the completions, in float64 on the CPU: (logp, entropy), each (2, 2)."""
    rows = []
    for z, y, m in zip(logits.double().cpu(), targets.cpu(), mask.cpu(), strict=True):
        logp, entropy = oracle.of_logits(z[m], oracle.Head(), y[m], temperature)[:2]
        divisor = max(int(m.sum()), 1) if reduce == "mean" else 1
        rows.append((logp.sum() / divisor, entropy.sum() / divisor))
    return (torch.stack([row[column] for row in rows]).view(2, 2) for column in range(2))


def assert_close(ours, exact, tolerance=1e-5):
    torch.testing.assert_close(ours.cpu().double(), exact.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_reduced_values_and_gradients(place, reduce, layout, dtype):
    backend, device = place
    logits, targets, mask = padded(dtype, device)
    z = logits.clone().requires_grad_()
    options = {
        "group_size": 2,
        "reduce": reduce,
        "return_entropy": True,
        "temperature": 0.8,
        "backend": backend,
    }
    if layout == "padded":
        result = grouped_logprobs(z, targets, mask=mask, **options)
    else:
        result = grouped_logprobs(z[mask], targets[mask], cu_seqlens=BOUNDS.to(device), **options)
    plain = logits.double().cpu().requires_grad_()
    logp, entropy = by_hand(plain, targets, mask, reduce)
    assert_close(result.logp, logp.detach())
    assert_close(result.entropy, entropy.detach())
    assert result.counts.tolist() == [[3, 0], [5, 1]] and result.counts.dtype == torch.int64
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    upstream = weights.to(device)
    (grad,) = torch.autograd.grad((result.logp * upstream - result.entropy * upstream).sum(), z)
    (expected,) = torch.autograd.grad((logp * weights - entropy * weights).sum(), plain, retain_graph=True)
    assert_close(grad, expected, 1e-5 if dtype == torch.float32 else 1e-2)
    for used in ("logp", "entropy"):
        # one of the two alone
        again = grouped_logprobs(z, targets, mask=mask, **options)
        (alone,) = torch.autograd.grad((getattr(again, used) * upstream).sum(), z)
        value = {"logp": logp, "entropy": entropy}[used]
        (expected,) = torch.autograd.grad((value * weights).sum(), plain, retain_graph=True)
        assert_close(alone, expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_token_values_keep_the_shape_of_the_targets(place, layout):
    backend, device = place
    logits, targets, mask = padded(device=device)
    flat = logits.double().cpu().flatten(0, 1)
    full = oracle.of_logits(flat, oracle.Head(), targets.cpu().flatten(), 1.0)[0].view(4, 5)
    options = {"group_size": 4, "reduce": "none", "backend": backend}
    if layout == "padded":
        result = grouped_logprobs(logits, targets, mask=mask, **options)
        assert_close(result.logp, torch.where(mask.cpu(), full, 0.0))
    else:
        result = grouped_logprobs(logits[mask], targets[mask], cu_seqlens=BOUNDS.int().to(device), **options)
        assert_close(result.logp, full[mask.cpu()])
    assert result.entropy is None and result.counts.tolist() == [list(LENGTHS)]


def test_garbage_in_masked_places_changes_nothing(place):
    backend, device = place
    logits, targets, mask = padded(device=device)
    dirty = logits.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    wild = targets.masked_fill(~mask, 10**9)
    options = {"group_size": 2, "return_entropy": True, "backend": backend}
    clean = grouped_logprobs(logits, targets, mask=mask, **options)
    result = grouped_logprobs(dirty, wild, mask=mask.int(), **options)
    assert torch.equal(result.logp, clean.logp) and torch.equal(result.entropy, clean.entropy)
    result.logp.sum().backward()
    assert torch.isfinite(dirty.grad).all() and (dirty.grad[~mask] == 0).all()


def test_garbage_in_masked_hidden_states_changes_nothing(place):
    backend, device = place
    _, targets, mask = padded(device=device)
    hidden, weight = torch.randn(4, 5, 6, device=device), torch.randn(9, 6, device=device)
    wild = targets.masked_fill(~mask, 10**9)
    found = []
    for states, chosen in (
        (hidden, targets),
        (hidden.masked_fill(~mask[..., None], float("nan")), wild),
    ):
        leaves = [leaf.clone().requires_grad_() for leaf in (states, weight)]
        result = linear_grouped_logprobs(*leaves, chosen, mask=mask, group_size=2, backend=backend)
        found.append((result.logp.detach(), *torch.autograd.grad(result.logp.sum(), leaves)))
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
def test_from_hidden_states_it_is_the_same(place, reduce, layout):
    backend, device = place
    _, targets, mask = padded(device=device)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 5, 6, generator=generator).to(device).requires_grad_()
    weight = torch.randn(9, 6, generator=generator).to(device).requires_grad_()
    options = {"group_size": 2, "reduce": reduce, "return_entropy": True, "temperature": 0.8}
    leaves = [leaf.detach().double().cpu().requires_grad_() for leaf in (hidden, weight)]
    logits = leaves[0] @ leaves[1].T
    if layout == "padded":
        how, exact_how = {"mask": mask}, {"mask": mask.cpu()}
        states, chosen = hidden, targets
        exact_logits, exact_targets = logits, targets.cpu()
    else:
        how, exact_how = {"cu_seqlens": BOUNDS.to(device)}, {"cu_seqlens": BOUNDS}
        states, chosen = hidden[mask], targets[mask]
        exact_logits, exact_targets = logits[mask.cpu()], targets.cpu()[mask.cpu()]
    how |= {"chunk_size": 3, "stats": ("is_top1",), "backend": backend}
    ours, stats = linear_grouped_logprobs(states, weight, chosen, **how, **options)
    plain = grouped_logprobs(exact_logits, exact_targets, **exact_how, **options, backend="reference")
    assert_close(ours.logp, plain.logp.detach())
    assert_close(ours.entropy, plain.entropy.detach())
    assert torch.equal(ours.counts.cpu(), plain.counts) and stats["is_top1"].shape == chosen.shape
    weights = torch.linspace(-1, 2, ours.logp.numel()).view(ours.logp.shape)
    grads = torch.autograd.grad(
        ((ours.logp + 0.5 * ours.entropy) * weights.to(device)).sum(), (hidden, weight)
    )
    expected = torch.autograd.grad(((plain.logp + 0.5 * plain.entropy) * weights).sum(), leaves)
    for grad, truth in zip(grads, expected, strict=True):
        assert_close(grad, truth)


@pytest.mark.parametrize("completions", [0, 2])
def test_no_tokens(place, completions):
    backend, device = place
    logits = torch.zeros(completions, 0, 9, device=device, requires_grad=True)
    targets = torch.zeros(completions, 0, dtype=torch.int64, device=device)
    for reduce in ("sum", "mean", "none"):
        result = grouped_logprobs(logits, targets, group_size=2, reduce=reduce, backend=backend)
        assert result.counts.shape == (completions // 2, 2) and (result.logp == 0).all()
        result.logp.sum().backward()
        assert logits.grad.shape == logits.shape


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_packed_is_padded(lengths, seed):
    """Token values have the same bits; sums may differ in their last ones, their order being that of the layout."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    logits = torch.randn(len(lengths), 6, 40, generator=generator)
    targets = torch.randint(0, 40, mask.shape, generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    for reduce in ("none", "sum", "mean"):
        options = {"group_size": 1, "reduce": reduce, "return_entropy": True}
        wide = grouped_logprobs(logits, targets, mask=mask, **options)
        packed = grouped_logprobs(logits[mask], targets[mask], cu_seqlens=bounds, **options)
        assert torch.equal(wide.counts, packed.counts)
        if reduce == "none":
            assert same_bits(wide.logp[mask], packed.logp) and same_bits(wide.entropy[mask], packed.entropy)
        else:
            torch.testing.assert_close(wide.logp, packed.logp, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(wide.entropy, packed.entropy, rtol=1e-6, atol=1e-6)


def test_an_ignored_target_does_not_count():
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    targets = torch.tensor([[1, -100, 2], [0, 0, -100]])
    result = linear_grouped_logprobs(hidden, weight, targets, group_size=2, reduce="mean")
    assert result.counts.tolist() == [[2, 2]]


@pytest.mark.parametrize(("layout", "reduce"), [("padded", "sum"), ("packed", "mean"), ("padded", "none")])
def test_it_compiles_in_one_graph(place, layout, reduce):
    backend, device = place
    logits, targets, mask = padded(device=device)
    z = logits.requires_grad_()
    options = {"group_size": 2, "reduce": reduce, "backend": backend}

    def plain(z):
        if layout == "padded":
            return grouped_logprobs(z, targets, mask=mask, **options).logp
        tokens = z.flatten(0, 1)[:9]
        return grouped_logprobs(tokens, targets.flatten()[:9], cu_seqlens=BOUNDS.to(device), **options).logp

    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), plain(z))
    grads = [torch.autograd.grad(run(z).sum(), z)[0] for run in (compiled, plain)]
    torch.testing.assert_close(*grads)


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
