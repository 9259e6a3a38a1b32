"""K targets a token in token_logprobs and linear_logprobs, on every backend. N tokens, H hidden, V vocabulary, K targets per token."""

from __future__ import annotations

import pytest
import torch

from r1kernels import linear_logprobs, token_logprobs
from tests.support import linear_oracle, logprob_oracle
from tests.support.numerics import assert_as_exact_as, same_bits

OP = "linear_logprobs"
N, H, V, K = 11, 6, 67, 5
IGNORED = -100
HEAD = {"softcap": 5.0, "logit_scale": 0.7}


def problem(device="cpu", dtype=torch.float32, tokens=N, hidden=H, vocabulary=V, count=K):
    """(hidden, weight, bias) leaves and targets: some ignored, some there twice, token 1 without any."""
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, hidden), (vocabulary, hidden), (vocabulary,)
    leaves = [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes]
    targets = torch.randint(0, vocabulary, (tokens, count), generator=generator)
    targets[::3, 1] = targets[::3, 0]
    targets[::4, 2:] = IGNORED
    targets[1] = IGNORED
    return leaves, targets.to(device)


def results_and_gradients(logp, entropy, leaves):
    """logp (N, K), entropy (N,) and the gradients of a weighted sum of both."""
    weights = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype, device=logp.device).view(logp.shape)
    loss = (logp * weights).sum() + (entropy * weights[:, 0]).sum()
    return logp.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)


def exact(leaves, targets, temperature=1.0, softcap=None, logit_scale=1.0):
    """In float64 by torch.log_softmax, one target after the other."""
    leaves = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    raw, bias = leaves[0] @ leaves[1].T, leaves[2]
    targets = targets.cpu()
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().cpu()
    head = linear_oracle.Head(bias, logit_scale, softcap)
    columns = [linear_oracle.of_logits(raw, head, y, temperature) for y in targets.unbind(1)]
    logp = torch.stack([column[0] for column in columns], 1)
    entropy = linear_oracle.of_logits(raw, head, torch.zeros_like(targets[:, 0]), temperature)[1]
    entropy = torch.where((targets != IGNORED).any(1), entropy, 0.0)
    return results_and_gradients(logp, entropy, leaves)


def assert_close(ours, truth, tolerance=1e-5):
    for mine, value in zip(ours, truth, strict=True):
        scale = float(value.abs().max())
        torch.testing.assert_close(mine.cpu().double(), value, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {}),
        ({}, {"chunk_size": 1}),
        (HEAD | {"temperature": 1.3}, {"chunk_size": 4, "save_logits": False}),
        (HEAD | {"temperature": torch.linspace(0.5, 2, N), "logit_scale": -1.0}, {"save_logits": True}),
        (HEAD, {"batch_invariant": True, "chunk_size": 3, "save_logits": True}),
        ({"logit_scale": -0.5}, {"save_logits": True}),
        ({"logit_scale": 0.0}, {"chunk_size": 4, "save_logits": False}),
    ],
    ids=str,
)
def test_they_are_the_log_probs_of_one_target_after_the_other(place, options, how):
    backend, device = place
    leaves, targets = problem(device)
    options = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()
    }
    x, w, b = leaves
    logp, entropy = linear_logprobs(
        x, w, targets, bias=b, return_entropy=True, backend=backend, **options, **how
    )
    assert logp.dtype == entropy.dtype == torch.float32 and logp.shape == (N, K) and entropy.shape == (N,)
    assert (logp[targets == IGNORED] == 0).all() and entropy[1] == 0
    assert_close(results_and_gradients(logp, entropy, leaves), exact(leaves, targets, **options))


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.linspace(0.5, 2, 6).view(2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["packed", "slice", "strided", "expanded"])
def test_of_logits_with_any_strides(place, temperature, layout):
    backend, device = place
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(2, 4, 3 * V, generator=generator).to(device)
    logits = {
        "packed": base[:, :3, :V].contiguous(),
        "slice": base[:, :-1, 5:72],
        "strided": base[:, 1:, ::3],
        "expanded": base[:1, :3, :V].expand(2, 3, V),
    }[layout].detach()
    _, targets = problem(device, tokens=6)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(device)
    z = logits.requires_grad_()
    logp, entropy = token_logprobs(
        z,
        targets.view(2, 3, K),
        temperature=temperature,
        return_entropy=True,
        backend=backend,
    )
    assert logp.shape == (2, 3, K) and entropy.shape == (2, 3)
    ours = results_and_gradients(logp.view(6, K), entropy.view(6), [z])
    double = z.detach().double().cpu().requires_grad_()
    flat = temperature.cpu().double().flatten() if isinstance(temperature, torch.Tensor) else temperature
    plain = linear_oracle.Head()
    columns = [
        linear_oracle.of_logits(double.reshape(6, V), plain, y, flat)[0] for y in targets.cpu().unbind(1)
    ]
    zeros = torch.zeros(6, dtype=torch.int64)
    of_rows = linear_oracle.of_logits(double.reshape(6, V), plain, zeros, flat)[1]
    of_rows = torch.where((targets.cpu() != IGNORED).any(1), of_rows, 0.0)
    assert_close(ours, results_and_gradients(torch.stack(columns, 1), of_rows, [double]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_exact_as_eager(place, dtype):
    backend, device = place
    leaves, targets = problem(device, dtype, tokens=64, hidden=48, vocabulary=2100)
    targets = targets.clamp(min=0)
    x, w, b = leaves
    logp, entropy = linear_logprobs(x, w, targets, bias=b, return_entropy=True, backend=backend)
    ours = results_and_gradients(logp, entropy, leaves)
    everything = torch.log_softmax(torch.nn.functional.linear(x, w, b), -1)
    theirs = results_and_gradients(
        everything.gather(-1, targets), -(everything.exp() * everything).sum(-1), leaves
    )
    assert [value.dtype for value in ours] == [torch.float32, torch.float32, dtype, dtype, dtype]
    for mine, peer, truth in zip(ours, theirs, exact(leaves, targets), strict=True):
        assert_as_exact_as(mine.cpu(), peer.cpu(), truth, mine.dtype)


@pytest.mark.parametrize("lead", [10.0, 20.0, 30.0, 80.0])
@pytest.mark.parametrize("leader_is_asked", [True, False])
def test_a_leading_logit_costs_no_digits(place, lead, leader_is_asked):
    """Against the textbook formulas in 60 digits."""
    backend, device = place
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    logits[0, 123] = logits.max() + lead
    targets = torch.tensor([[7, 123 if leader_is_asked else 8, 250]])
    z = logits.to(device, copy=True).requires_grad_()
    logp, entropy = token_logprobs(z, targets.to(device), return_entropy=True, backend=backend)
    rows = logits.expand(3, 300)
    exact_logp, exact_entropy = logprob_oracle.rows(rows, targets[0])
    rtol = 2e-6 + lead * 2.0**-24
    torch.testing.assert_close(logp[0].cpu().double(), exact_logp, rtol=rtol, atol=1e-44)
    torch.testing.assert_close(entropy.cpu().double(), exact_entropy[:1], rtol=rtol, atol=1e-44)
    for upstream, values in (((1.0, 0.0), logp[0, 1]), ((0.0, 1.0), entropy[0])):
        (grad,) = torch.autograd.grad(values, z, retain_graph=True)
        truth = torch.tensor(logprob_oracle.gradient(logits[0].tolist(), int(targets[0, 1]), *upstream))
        largest = float(truth.abs().max())
        torch.testing.assert_close(
            grad[0].cpu().double(), truth.double(), rtol=1e-5, atol=max(3e-6 * largest, 2e-36)
        )


def test_masked_vocabulary_and_broken_rows(place):
    """Ids that hold all that is left; a target at -inf; a row of -inf alone, one with NaN, one with +inf."""
    backend, device = place
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([[3, 4], [5, 6], [0, 1], [0, 1], [0, 1], [8, 9]])
    logits[0] = -torch.inf
    logits[0, 3:5] = torch.tensor([1.0, 2.0])
    logits[1, 5] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 50] = torch.nan
    logits[4, 0] = torch.inf
    z = logits.to(device).requires_grad_()
    logp, entropy = token_logprobs(z, targets.to(device), return_entropy=True, backend=backend)
    assert logp[1, 0] == -torch.inf and logp[2:5].isnan().all() and entropy[2:5].isnan().all()
    good = [0, 5]
    for row in good:
        found = linear_oracle.of_logits(
            logits[row].double().expand(2, V), linear_oracle.Head(), targets[row], 1.0
        )
        torch.testing.assert_close(logp[row].cpu().double(), found[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy[row].cpu().double(), found[1][0], rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(logp[good].sum() + logp[1, 1] + entropy[good].sum() + entropy[1], z)
    assert grad[[0, 1, 5]].isfinite().all()
    assert (grad[0, :3] == 0).all() and grad[1, 5] == 0 and (grad[0, 3:5] != 0).all()


@pytest.mark.parametrize("head", [{}, HEAD])
def test_what_tokens_without_a_target_hold_does_not_matter(place, head):
    backend, device = place
    leaves, targets = problem(device)
    dirty = leaves[0].detach().clone()
    dirty[1] = torch.nan
    found = []
    for x in (dirty, leaves[0].detach().clone()):
        inputs = [x.requires_grad_(), *leaves[1:]]
        logp, entropy = linear_logprobs(
            *inputs[:2], targets, bias=inputs[2], return_entropy=True, backend=backend, **head
        )
        found.append(results_and_gradients(logp, entropy, inputs))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert (found[0][2][1] == 0).all()


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("save_logits", [False, True])
def test_what_is_frozen_costs_no_gradient(place, trained, save_logits):
    backend, device = place
    leaves, targets = problem(device)
    grads = []
    for needs in (trained, (True, True, True)):
        inputs = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
        logp = linear_logprobs(*inputs[:2], targets, bias=inputs[2], save_logits=save_logits, backend=backend)
        logp.sum().backward()
        grads.append([leaf.grad for leaf in inputs])
    for need, alone, together in zip(trained, *grads, strict=True):
        assert (alone is not None) == need
        if need:
            torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("save_logits", [False, True])
def test_a_graph_that_is_kept_gives_the_same_gradient_twice(place, save_logits):
    backend, device = place
    leaves, targets = problem(device)
    logp = linear_logprobs(*leaves[:2], targets, bias=leaves[2], save_logits=save_logits, backend=backend)
    first = torch.autograd.grad(logp.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(logp.sum(), leaves)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_token_has_the_same_bits_in_any_company_and_two_runs_agree(place):
    backend, device = place
    if backend == "reference":
        pytest.skip("the reference sums in the order of torch.sum, which depends on the shape")
    leaves, targets = problem(device, tokens=40, vocabulary=4099)
    x, w, b = (leaf.detach() for leaf in leaves)
    logits = x @ w.T + b

    def of_logits(rows):
        return token_logprobs(logits[rows], targets[rows], return_entropy=True, backend=backend)

    def of_hidden(rows):
        return linear_logprobs(
            x[rows],
            w,
            targets[rows],
            bias=b,
            return_entropy=True,
            batch_invariant=True,
            backend=backend,
        )

    everything = torch.arange(40, device=device)
    order = torch.randperm(40, device=device)
    for run in (of_logits, of_hidden):
        first, again, turned, alone = run(everything), run(everything), run(order), run(everything[17:18])
        for one, two, three, four in zip(first, again, turned, alone, strict=True):
            assert same_bits(one, two) and same_bits(one[order], three) and same_bits(one[17:18], four)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(place, shape):
    backend, device = place
    hidden = torch.randn(*shape, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=True)
    targets = torch.zeros(*shape, K, dtype=torch.int64, device=device)
    for logp, entropy in (
        linear_logprobs(hidden, weight, targets, return_entropy=True, backend=backend),
        token_logprobs(hidden @ weight.T, targets, return_entropy=True, backend=backend),
    ):
        assert logp.shape == (*shape, K) and entropy.shape == shape
        grads = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
        assert (grads[1] == 0).all() and grads[0].shape == hidden.shape


def test_it_compiles_in_one_graph_and_lengths_do_not_recompile(place):
    backend, device = place
    leaves, targets = problem(device)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(x, w, y):
        of_hidden = linear_logprobs(x, w, y, return_entropy=True, backend=backend)
        return *of_hidden, *token_logprobs(x @ w.T, y, return_entropy=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend=count)
    for tokens in (N, 7, 4):
        x, w = (leaf.detach()[:tokens] if leaf.shape[0] == N else leaf.detach() for leaf in leaves[:2])
        call = (x.clone().requires_grad_(), w.clone().requires_grad_(), targets[:tokens].clone())
        for of_tokens in (call[0], call[2]):
            torch._dynamo.mark_dynamic(of_tokens, 0)
        found, plain = compiled(*call), function(*call)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
        grads = [
            torch.autograd.grad(sum(value.sum() for value in values), call[:2]) for values in (found, plain)
        ]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_gradcheck_of_the_reference():
    leaves, targets = problem(dtype=torch.float64, tokens=3, hidden=2, vocabulary=7, count=4)
    options = HEAD | {"temperature": 1.3, "return_entropy": True, "chunk_size": 2}
    assert torch.autograd.gradcheck(lambda x, w, b: linear_logprobs(x, w, targets, bias=b, **options), leaves)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    temperature = torch.rand(3, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, targets, temperature=temperature, return_entropy=True), logits
    )


@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs"])
def test_arguments_that_it_refuses(op):
    leaves, targets = problem()

    def call(targets=targets, **options):
        if op == "token_logprobs":
            return token_logprobs(leaves[0] @ leaves[1].T, targets, **options)
        return linear_logprobs(*leaves[:2], targets, **options)

    with pytest.raises(ValueError, match=r"targets: expected shape \(\.\.\., K\) with K >= 1, got \(11, 0\)"):
        call(targets[:, :0])
    with pytest.raises(ValueError, match=r"targets: expected shape \(11, any\), got \(10, 5\)"):
        call(targets[1:])
    with pytest.raises(IndexError, match=r"got 67 at position \(2, 3\)"):
        call(targets.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(V)))
    kept = (torch.tensor([1]), torch.tensor([0, 1] + [1] * 10))
    with pytest.raises(ValueError, match="kept: expected none together with K targets per token"):
        call(kept=kept)
    if op == "linear_logprobs":
        with pytest.raises(ValueError, match="stats: expected none together with K targets per token"):
            call(stats=("is_top1",))


def test_a_second_derivative_is_refused(place):
    backend, device = place
    leaves, targets = problem(device)
    logits = (leaves[0] @ leaves[1].T).detach().requires_grad_()
    logp = token_logprobs(logits, targets, backend=backend)
    (grad,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs: a second derivative is not implemented"):
        grad.square().sum().backward()
