"""linear_logprobs under a frozen head: the slope is worked out in the forward. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import functools

import pytest
import torch

from r1kernels import linear_grouped_logprobs, linear_logprobs
from tests.support import linear_oracle as oracle
from tests.support.numerics import assert_as_exact_as, same_bits

OP = "linear_logprobs"
HEADS = {
    "plain": {},
    "everything": {"temperature": 1.3, "softcap": 5.0, "logit_scale": -0.7},
    "temperatures": {"temperature": torch.linspace(0.5, 2, 1030)},
}


def problem(tokens=1030, hidden=6, vocabulary=4099, dtype=torch.float32, device="cpu"):
    """(hidden, weight, bias, targets): on a CPU two blocks of tokens and three slabs of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, hidden), (vocabulary, hidden), (vocabulary,)
    x, weight, bias = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[1::4] = -100
    return x.requires_grad_(), weight, bias, targets.to(device)


def upstream(tokens, device="cpu"):
    return torch.linspace(-1, 1, tokens, device=device)


def exact(x, weight, bias, targets, temperature=1.0, softcap=None, logit_scale=1.0):
    """(logp, gradient of hidden) by torch's log_softmax in float64."""
    leaf = x.detach().cpu().double().requires_grad_()
    head = oracle.Head(bias.cpu().double(), logit_scale, softcap)
    temperature = temperature.double().cpu() if isinstance(temperature, torch.Tensor) else temperature
    logp = oracle.of_logits(leaf @ weight.cpu().double().T, head, targets.cpu(), temperature)[0]
    return logp.detach(), torch.autograd.grad((logp * upstream(len(logp)).double()).sum(), leaf)[0]


@functools.cache  # every backend and chunk size asks for the same
def exact_of(head):
    return exact(*problem(), **HEADS[head])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk_size", [None, 300])
def test_every_head(place, head, chunk_size):
    backend, device = place
    x, weight, bias, targets = problem(device=device)
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in HEADS[head].items()
    }
    logp, stats = linear_logprobs(
        x, weight, targets, bias=bias, chunk_size=chunk_size, stats=("is_top1",), backend=backend, **moved
    )
    (grad,) = torch.autograd.grad((logp * upstream(1030, device)).sum(), x)
    with torch.no_grad():
        plain, same = linear_logprobs(
            x, weight, targets, bias=bias, stats=("is_top1",), backend=backend, **moved
        )
    torch.testing.assert_close(logp.detach(), plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(stats["is_top1"], same["is_top1"])
    for ours, truth in zip((logp.detach(), grad), exact_of(head), strict=True):
        scale = float(truth.abs().max())
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-5, atol=1e-5 * scale)
    assert (grad[1::4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_eager(place, dtype):
    backend, device = place
    x, weight, bias, targets = problem(128, 48, 5000, dtype, device)
    targets = targets.clamp(min=0)
    logp = linear_logprobs(x, weight, targets, bias=bias, backend=backend)
    (grad,) = torch.autograd.grad((logp * upstream(128, device)).sum(), x)
    eager = torch.log_softmax(torch.nn.functional.linear(x, weight, bias).float(), -1)
    eager = eager.gather(-1, targets[:, None])[:, 0]
    (peer,) = torch.autograd.grad((eager * upstream(128, device)).sum(), x)
    assert grad.dtype == dtype
    assert_as_exact_as(grad.cpu(), peer.cpu(), exact(x, weight, bias, targets)[1], dtype)


def test_a_target_at_the_cap(place):
    """There the slope of the cap, 1 - tanh^2, is small: it keeps its digits row by row."""
    backend, device = place
    x, weight, bias, targets = problem(64, 16, 300, device=device)
    x = (3 * x.detach()).requires_grad_()
    targets[:] = (x @ weight.T + bias).argmax(-1)
    logp = linear_logprobs(x, weight, targets, bias=bias, softcap=2.0, backend=backend)
    (grad,) = torch.autograd.grad((logp * upstream(64, device)).sum(), x)
    truth = exact(x, weight, bias, targets, softcap=2.0)[1]
    error = (grad.cpu().double() - truth).norm(dim=-1) / truth.norm(dim=-1)
    assert error.max() < 1e-5


@pytest.mark.parametrize("lead", [10.0, 20.0, 30.0])
@pytest.mark.parametrize("target", [3, 4000])
def test_the_gradient_of_a_leading_target_does_not_cancel(place, lead, target):
    """Logits are the entries of a column: d logp / d x = sum_{v != y} p_v (w_y - w_v), about e^-lead."""
    backend, device = place
    column = torch.arange(4099).remainder(13).float() / 8
    column[target] = column.max() + lead
    weight = column.unsqueeze(1).to(device)
    x = torch.ones(1030, 1, device=device, requires_grad=True)
    targets = torch.full((1030,), target, device=device)
    (grad,) = torch.autograd.grad(linear_logprobs(x, weight, targets, backend=backend).sum(), x)
    z = column.double()
    probs = torch.softmax(z, 0)
    expected = (probs * (z[target] - z)).sum().expand(1030, 1)
    torch.testing.assert_close(grad.cpu().double(), expected, rtol=2e-5, atol=0)


def test_masked_vocabulary_and_broken_rows(place):
    """A first slab of -inf, a target at -inf, NaN in one row of hidden states, and in one that is ignored."""
    backend, device = place
    x, weight, bias, targets = problem(device=device)
    bias[:2500] = -torch.inf
    targets[:] = targets.clamp(min=2500)
    targets[:2] = torch.tensor([5, -100])
    with torch.no_grad():
        x[1], x[2] = torch.nan, torch.nan
    logp = linear_logprobs(x, weight, targets, bias=bias, backend=backend)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    assert logp[0] == -torch.inf and logp[1] == 0 and logp[2].isnan()
    assert grad[0].isfinite().all() and (grad[1] == 0).all() and grad[2].isnan().all()
    shifted = targets[3:] - 2500
    kept = exact(x[3:], weight[2500:], bias[2500:], shifted)[0]
    torch.testing.assert_close(logp[3:].detach().cpu().double(), kept, rtol=1e-5, atol=1e-5)
    assert grad[3:].isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
def test_completions(place, packed, reduce):
    backend, device = place
    x, weight, bias, targets = problem(12, 6, 37, device=device)
    shape = (12,) if packed else (4, 3)
    bounds = torch.tensor([0, 3, 3, 5, 12], device=device)
    layout = {"cu_seqlens": bounds} if packed else {}

    def gradient(head, **how):
        result = linear_grouped_logprobs(
            x.view(*shape, 6),
            head,
            targets.view(shape),
            bias=bias,
            group_size=2,
            reduce=reduce,
            **layout,
            **how,
        )
        factors = torch.arange(result.logp.numel(), device=device).view(result.logp.shape) + 1.0
        return torch.autograd.grad((factors * result.logp).sum(), x)[0]

    whole = gradient(weight.clone().requires_grad_(), backend="reference")
    torch.testing.assert_close(gradient(weight, backend=backend), whole, rtol=1e-5, atol=1e-5)


def test_the_graph_may_be_gone_through_twice_but_not_differentiated_twice(place):
    backend, device = place
    x, weight, bias, targets = problem(12, 6, 37, device=device)
    loss = linear_logprobs(x, weight, targets, bias=bias, backend=backend).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, create_graph=True)[0]
    assert same_bits(first, second.detach())
    if backend != "reference":
        with pytest.raises(RuntimeError, match="a second derivative is not implemented"):
            torch.autograd.grad(second.sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_logits_are_kept(place, dtype):
    """The hidden states and a float32 slope, each of N H elements, not the N V logits."""
    backend, device = place
    if backend == "reference":
        pytest.skip("the reference keeps the logits, or the chunks to compute them again")
    x, weight, bias, targets = problem(dtype=dtype, device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        linear_logprobs(x, weight, targets, bias=bias, backend=backend)
    assert sum(kept) <= 1030 * 6 * (4 + x.element_size())


def test_it_compiles_in_one_graph(place):
    backend, device = place
    x, weight, bias, targets = problem(12, 6, 37, device=device)

    def function(x):
        return linear_logprobs(x, weight, targets, bias=bias, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (function, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(0, 6, 37), (1, 1, 1)], ids=str)
def test_no_tokens_and_one_column(place, shape):
    backend, device = place
    x, weight, bias, targets = problem(*shape, device=device)
    logp = linear_logprobs(x, weight, targets, bias=bias, backend=backend)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    assert (logp == 0).all() and (grad == 0).all() and grad.shape == x.shape
