"""The contract of token_logprobs, on every backend: N tokens, V vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1kernels import token_logprobs
from tests.support import logprob_oracle as oracle
from tests.support.numerics import assert_as_exact_as, same_bits

OP = "token_logprobs"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eager(logits, targets, temperature=1.0):
    """What people write today, in the dtype of the logits."""
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (3, 2), (7, 17), (5, 513), (2, 2049)])
def test_values_and_gradient_are_as_exact_as_eager(place, dtype, tokens, vocabulary):
    backend, device = place
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    grad_logp, grad_entropy = torch.randn(2, tokens, generator=generator)

    def run(function):
        z = logits.to(device, copy=True).requires_grad_()
        logp, entropy = function(z, targets.to(device))
        (logp * grad_logp.to(device) + entropy * grad_entropy.to(device)).sum().backward()
        return logp.detach().cpu(), entropy.detach().cpu(), z.grad.cpu()

    ours = run(lambda z, y: token_logprobs(z, y, temperature=0.7, return_entropy=True, backend=backend))
    theirs = run(lambda z, y: eager(z, y, 0.7))
    exact = (
        *oracle.rows(logits, targets, 0.7),
        oracle.gradients(logits, targets, grad_logp, grad_entropy, 0.7),
    )
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == dtype
    assert (ours[0] <= 0).all() and (ours[1] >= 0).all()
    for mine, peer, truth, precision in zip(
        ours, theirs, exact, (torch.float32, torch.float32, dtype), strict=True
    ):
        assert_as_exact_as(mine, peer, truth, precision)


@pytest.mark.parametrize("lead", [10.0, 16.0, 20.0, 24.0, 30.0, 80.0])
@pytest.mark.parametrize("leader_is_target", [True, False])
def test_a_leading_logit_costs_no_digits(place, lead, leader_is_target):
    backend, device = place
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0))
    logits[0, 1234] = logits.max() + lead
    targets = torch.tensor([1234 if leader_is_target else 7])
    z = logits.to(device, copy=True).requires_grad_()
    logp, entropy = token_logprobs(z, targets.to(device), return_entropy=True, backend=backend)
    (grad_of_logp,) = torch.autograd.grad(logp.sum(), z, retain_graph=True)
    (grad_of_entropy,) = torch.autograd.grad(entropy.sum(), z)
    exact_logp, exact_entropy = oracle.rows(logits, targets)
    one, zero = torch.ones(1), torch.zeros(1)
    # e^(x - M) inherits one rounding of x - M, which is as large as the lead
    rtol = 2e-6 + lead * 2.0**-24
    torch.testing.assert_close(logp.cpu().double(), exact_logp, rtol=rtol, atol=1e-44)
    torch.testing.assert_close(entropy.cpu().double(), exact_entropy, rtol=rtol, atol=1e-44)
    # a probability below the smallest normal float may be 0; times M - x that is at most 2e-36
    for mine, upstream in ((grad_of_logp, (one, zero)), (grad_of_entropy, (zero, one))):
        exact = oracle.gradients(logits, targets, *upstream)
        largest = exact.abs().max()
        torch.testing.assert_close(
            mine.cpu().double(), exact, rtol=1e-5, atol=max(3e-6 * float(largest), 2e-36)
        )


def test_masked_vocabulary_is_exact_and_broken_rows_stay_alone(place):
    backend, device = place
    inf = float("inf")
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(1))
    logits[0, :600] = -inf
    logits[1, 5] = -inf
    logits[2] = -inf
    logits[3, 699] = float("nan")
    logits[4, 1:] = -inf
    targets = torch.tensor([650, 5, 3, 4, 0, 9])
    z = logits.to(device, copy=True).requires_grad_()
    logp, entropy = token_logprobs(z, targets.to(device), return_entropy=True, backend=backend)
    exact_logp, exact_entropy = oracle.rows(logits[[0, 4, 5]], targets[[0, 4, 5]])
    torch.testing.assert_close(logp[[0, 4, 5]].cpu().double(), exact_logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy[[0, 4, 5]].cpu().double(), exact_entropy, rtol=1e-6, atol=1e-6)
    assert logp[1] == -inf and torch.isfinite(entropy[1])
    assert logp[2:4].isnan().all() and entropy[2:4].isnan().all()
    (logp[[0, 1, 4, 5]].sum() + entropy[[0, 1, 4, 5]].sum()).backward()
    rows = z.grad[[0, 1, 4, 5]]
    assert torch.isfinite(rows).all()
    assert (z.grad[0, :600] == 0).all() and (z.grad[4] == 0).all()


def test_a_logit_at_plus_infinity_makes_its_row_nan(place):
    backend, device = place
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(6))
    logits[0, 5] = logits[1, 5] = float("inf")
    z = logits.to(device, copy=True).requires_grad_()
    targets = torch.tensor([5, 7, 7], device=device)
    logp, entropy = token_logprobs(z, targets, return_entropy=True, backend=backend)
    assert logp[:2].isnan().all() and entropy[:2].isnan().all()
    assert torch.isfinite(logp[2]) and torch.isfinite(entropy[2])
    logp.sum().backward()
    assert z.grad[:2].isnan().all() and torch.isfinite(z.grad[2]).all()


def test_a_vocabulary_of_one(place):
    backend, device = place
    logits = torch.tensor([[3.0], [float("nan")], [float("inf")], [-float("inf")]], device=device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    for values in token_logprobs(logits, targets, return_entropy=True, backend=backend):
        assert values[0] == 0 and values[1:].isnan().all()


def test_ignored_tokens_give_exact_zeros_whatever_they_hold(place):
    backend, device = place
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(2))
    logits[1], logits[2, 3] = float("nan"), float("inf")
    targets = torch.tensor([4, -100, -100, 32])
    z = logits.to(device, copy=True).requires_grad_()
    logp, entropy = token_logprobs(z, targets.to(device), return_entropy=True, backend=backend)
    (logp.sum() + entropy.sum()).backward()
    assert (logp[1:3] == 0).all() and (entropy[1:3] == 0).all() and (z.grad[1:3] == 0).all()
    assert torch.isfinite(z.grad).all() and (z.grad[0] != 0).all()


def test_a_mark_inside_the_vocabulary_is_a_mark(place):
    backend, device = place
    logits = torch.randn(3, 5, device=device)
    logp = token_logprobs(logits, torch.tensor([2, 1, 2], device=device), ignore_index=2, backend=backend)
    assert logp[0] == 0 and logp[1] < 0 and logp[2] == 0


def test_a_temperature_a_token_is_the_same_as_one_call_a_token(place):
    backend, device = place
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 50, generator=generator).to(device)
    targets = torch.randint(0, 50, (2, 3), generator=generator).to(device)
    temperature = (torch.rand(2, 3, generator=generator) + 0.5).to(device)
    z = logits.clone().requires_grad_()
    logp, entropy = token_logprobs(z, targets, temperature=temperature, return_entropy=True, backend=backend)
    (logp.sum() + 2 * entropy.sum()).backward()
    for i in range(2):
        for j in range(3):
            exact = oracle.rows(logits[i, j].cpu()[None], targets[i, j].cpu()[None], float(temperature[i, j]))
            assert abs(logp[i, j].item() - exact[0].item()) < 2e-6
            assert abs(entropy[i, j].item() - exact[1].item()) < 3e-6
            grad = oracle.gradient(
                logits[i, j].double().tolist(), int(targets[i, j]), 1.0, 2.0, float(temperature[i, j])
            )
            torch.testing.assert_close(
                z.grad[i, j].cpu().double(), torch.tensor(grad).double(), rtol=1e-4, atol=2e-6
            )


@pytest.mark.parametrize(
    "layout", ["slice", "transposed", "expanded", "strided", "offset", "four_dimensions"]
)
def test_any_strides(place, layout):
    backend, device = place
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(4, 6, 40, generator=generator).to(device)
    logits = {
        "slice": base[:, :-1],
        "transposed": base.transpose(0, 1),
        "expanded": base[:1].expand(4, 6, 40),
        "strided": base[..., ::3],
        "offset": base.flatten()[1 : 1 + 4 * 5 * 40].view(4, 5, 40),
        "four_dimensions": base.view(2, 2, 6, 40).transpose(1, 2),
    }[layout]
    targets = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator).to(device)
    z = logits.detach().requires_grad_()
    packed = logits.detach().contiguous().clone().requires_grad_()
    results = []
    for leaf in (z, packed):
        logp, entropy = token_logprobs(leaf, targets, return_entropy=True, backend=backend)
        (grad,) = torch.autograd.grad(logp.sum() - entropy.sum(), leaf)
        results.append((logp, entropy, grad))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (1, 7), (7,)])
def test_few_or_no_tokens(place, shape):
    backend, device = place
    logits = torch.randn(shape, device=device, requires_grad=True)
    targets = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    logp, entropy = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    assert logp.shape == entropy.shape == shape[:-1]
    (logp.sum() + entropy.sum()).backward()
    assert logits.grad.shape == shape


def test_only_the_gradients_that_are_there_count(place):
    backend, device = place
    logits = torch.randn(3, 20, device=device)
    targets = torch.tensor([0, 5, 19], device=device)

    def gradient(use):
        z = logits.clone().requires_grad_()
        logp, entropy = token_logprobs(z, targets, return_entropy=True, backend=backend)
        (grad,) = torch.autograd.grad(use(logp, entropy), z)
        return grad

    both = gradient(lambda logp, entropy: logp.sum() + entropy.sum())
    apart = gradient(lambda logp, entropy: logp.sum()) + gradient(lambda logp, entropy: entropy.sum())
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-6)


def test_a_row_has_the_same_bits_in_any_company(place):
    backend, device = place
    if backend == "reference":
        pytest.skip("the reference sums in the order of torch.sum, which depends on the shape")
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(37, 4099, generator=generator).to(device)
    targets = torch.randint(0, 4099, (37,), generator=generator).to(device)
    every = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    order = torch.randperm(37, generator=generator).to(device)
    shuffled = token_logprobs(logits[order], targets[order], return_entropy=True, backend=backend)
    alone = token_logprobs(logits[11:12], targets[11:12], return_entropy=True, backend=backend)
    for values, mixed, single in zip(every, shuffled, alone, strict=True):
        assert same_bits(values[order], mixed) and same_bits(values[11:12], single)


def test_two_runs_agree_bit_for_bit(place):
    backend, device = place
    logits = torch.randn(9, 1000, device=device)
    targets = torch.randint(0, 1000, (9,), device=device)
    runs = []
    for _ in range(2):
        z = logits.clone().requires_grad_()
        logp, entropy = token_logprobs(z, targets, return_entropy=True, backend=backend)
        (logp.sum() + entropy.sum()).backward()
        runs.append((logp, entropy, z.grad))
    assert all(same_bits(first, second) for first, second in zip(*runs, strict=True))


def test_inplace_backward_writes_over_the_logits_and_nobody_reads_them_after(place):
    backend, device = place
    leaf = torch.randn(4, 50, device=device, requires_grad=True)
    targets = torch.randint(0, 50, (4,), device=device)
    fresh = leaf.detach().clone().requires_grad_()
    token_logprobs(fresh, targets, backend=backend).sum().backward()

    logits = leaf * 1
    address = logits.data_ptr()
    seen = []
    logits.register_hook(lambda grad: seen.append((grad.data_ptr(), grad.clone())))
    logp = token_logprobs(logits, targets, inplace_backward=True, backend=backend)
    logp.sum().backward(retain_graph=True)
    assert seen[0][0] == address and same_bits(seen[0][1], fresh.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()

    shared = leaf * 1
    total = (
        token_logprobs(shared, targets, inplace_backward=True, backend=backend).sum() + shared.exp().sum() * 0
    )
    reader = (shared * shared).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        reader.backward()


def test_inplace_backward_refuses_what_it_would_destroy(place):
    backend, device = place
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="inplace_backward: expected logits that are not a leaf"):
        token_logprobs(
            torch.randn(4, 5, device=device, requires_grad=True),
            targets,
            inplace_backward=True,
            backend=backend,
        )
    leaf = torch.randn(4, 6, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="expected logits that are not a leaf, got a view of one"):
        token_logprobs(leaf[:, :5], targets, inplace_backward=True, backend=backend)
    row = torch.randn(1, 5, device=device, requires_grad=True) * 1
    with pytest.raises(ValueError, match="inplace_backward: expected logits without overlap"):
        token_logprobs(row.expand(4, 5), targets, inplace_backward=True, backend=backend)


def test_a_second_derivative_is_refused(place):
    backend, device = place
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    logp = token_logprobs(logits, torch.tensor([0, 1], device=device), backend=backend)
    (grad,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs: a second derivative is not implemented"):
        grad.square().sum().backward()


def test_it_compiles_in_one_graph_and_lengths_do_not_recompile(place):
    backend, device = place
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda z, y: token_logprobs(z * 1.0, y, temperature=0.9, return_entropy=True, backend=backend),
        fullgraph=True,
        backend=count,
    )
    for tokens in (3, 5, 8):
        z = torch.randn(tokens, 30, device=device, requires_grad=True)
        y = torch.randint(0, 30, (tokens,), device=device)
        for of_tokens in (z, y):
            torch._dynamo.mark_dynamic(of_tokens, 0)
        logp, entropy = compiled(z, y)
        (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), z)
        plain = z.detach().requires_grad_()
        mine, value = token_logprobs(plain, y, temperature=0.9, return_entropy=True, backend=backend)
        (expected,) = torch.autograd.grad(mine.sum() + value.sum(), plain)
        torch.testing.assert_close((logp, entropy, grad), (mine, value, expected), rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


@given(
    shift=st.floats(-50, 50, width=32),
    seed=st.integers(0, 2**16),
    vocabulary=st.integers(1, 70),
)
def test_adding_a_number_to_all_logits_of_a_row_changes_nothing(shift, seed, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (3,), generator=generator)
    plain = token_logprobs(logits, targets, return_entropy=True)
    moved = token_logprobs(logits + shift, targets, return_entropy=True)
    torch.testing.assert_close(plain, moved, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 2**16), vocabulary=st.integers(2, 70))
def test_the_order_of_the_vocabulary_does_not_matter(seed, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (2,), generator=generator)
    order = torch.randperm(vocabulary, generator=generator)
    place_of = torch.argsort(order)
    plain = token_logprobs(logits, targets, return_entropy=True)
    moved = token_logprobs(logits[:, order], place_of[targets], return_entropy=True)
    torch.testing.assert_close(plain, moved, rtol=1e-5, atol=1e-5)


def test_the_reference_passes_gradcheck_in_float64():
    logits = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, -100, 8], [3, 4, 5]])
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, targets, temperature=temperature, return_entropy=True), logits
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_of_the_temperature_is_not_that_of_the_results(place, dtype):
    backend, device = place
    logits, targets = torch.randn(2, 5, device=device, dtype=dtype), torch.tensor([0, 1], device=device)
    for temperature in (torch.ones(2).double(), torch.ones(2).bfloat16()):
        results = token_logprobs(
            logits, targets, temperature=temperature.to(device), return_entropy=True, backend=backend
        )
        assert [value.dtype for value in results] == [torch.float32] * 2


def test_float64_gives_float64():
    logp, entropy = token_logprobs(torch.randn(2, 3).double(), torch.tensor([0, 1]), return_entropy=True)
    assert logp.dtype == entropy.dtype == torch.float64


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5), (2, 3, 0, 5), (0, 0, 4, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_no_tokens_in_any_shape_and_stride(place, shape, stride, return_entropy):
    backend, device = place
    z = torch.randn(*shape[:-1], stride * shape[-1], device=device).requires_grad_()
    targets = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    result = token_logprobs(z[..., ::stride], targets, return_entropy=return_entropy, backend=backend)
    values = result if return_entropy else (result,)
    assert all(value.shape == shape[:-1] and value.dtype == torch.float32 for value in values)
    (grad,) = torch.autograd.grad(sum(value.sum() for value in values), z)
    assert grad.shape == z.shape
