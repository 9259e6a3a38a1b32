"""linear_logprobs on every backend: token_logprobs of the head's logits. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import functools

import pytest
import torch

from r1kernels import linear_logprobs
from tests.support import linear_oracle as oracle
from tests.support.numerics import assert_as_exact_as, same_bits

OP = "linear_logprobs"
OPTIONS = {"temperature": 1.3, "softcap": 5.0, "logit_scale": 0.7, "return_entropy": True}
STATS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def problem(tokens=11, hidden=6, vocabulary=37, dtype=torch.float32, seed=0, device="cpu"):
    """(hidden, weight, bias, targets); every fourth target is ignored."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (tokens, hidden), (vocabulary, hidden), (vocabulary,)
    leaves = [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes]
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[1::4] = -100
    return *leaves, targets.to(device)


def results_and_gradients(function, *leaves):
    logp, entropy = function(*leaves)[:2]
    upstream = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype, device=logp.device)
    loss = (logp * upstream).sum() + (entropy * upstream.flip(0)).sum()
    return logp.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)


def exact(x, weight, bias, targets, options=OPTIONS):
    """In float64 on the CPU, by torch.log_softmax."""
    leaves = [leaf.detach().double().cpu().requires_grad_() for leaf in (x, weight, bias)]
    temperature = options.get("temperature", 1.0)
    temperature = temperature.double().cpu() if isinstance(temperature, torch.Tensor) else temperature

    def function(x, weight, bias):
        head = oracle.Head(bias, options.get("logit_scale", 1.0), options.get("softcap"))
        return oracle.of_logits(x @ weight.T, head, targets.cpu(), temperature)

    return results_and_gradients(function, *leaves)


def assert_close(ours, exact, tolerance=1e-5):
    for mine, truth in zip(ours, exact, strict=True):
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"chunk_size": 1},
        {"chunk_size": 4, "save_logits": False},
        {"chunk_size": 4, "save_logits": True},
        {"save_logits": False},
        {"save_logits": True},
        {"batch_invariant": True},
        {"batch_invariant": True, "chunk_size": 3, "save_logits": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [
        {"return_entropy": True},
        OPTIONS,
        OPTIONS | {"temperature": torch.linspace(0.5, 2, 11), "logit_scale": -1.0},
    ],
    ids=["plain", "capped", "temperatures"],
)
def test_however_it_is_cut_it_is_token_logprobs_of_the_logits(place, how, options):
    backend, device = place
    *leaves, targets = problem(device=device)
    options = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()
    }

    def function(x, w, b):
        return linear_logprobs(x, w, targets, bias=b, backend=backend, **options, **how)

    assert_close(results_and_gradients(function, *leaves), exact(*leaves, targets, options))


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"), [(1, 1, 1), (2, 3, 1), (1, 17, 1003), (65, 33, 515), (1030, 5, 2100)]
)
@pytest.mark.parametrize("save_logits", [False, True])
def test_any_size(place, tokens, hidden, vocabulary, save_logits):
    """The last one is cut into several blocks of tokens and several slabs of the vocabulary."""
    backend, device = place
    *leaves, targets = problem(tokens, hidden, vocabulary, device=device)

    def function(x, w, b):
        return linear_logprobs(
            x, w, targets, bias=b, save_logits=save_logits, backend=backend, return_entropy=True
        )

    truth = exact_of_size(tokens, hidden, vocabulary)
    assert_close(results_and_gradients(function, *leaves), truth)


@functools.cache  # every backend asks for the same
def exact_of_size(tokens, hidden, vocabulary):
    return exact(*problem(tokens, hidden, vocabulary), {})


def test_gradcheck_of_the_reference():
    x, weight, bias, targets = problem(tokens=4, hidden=3, vocabulary=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_logprobs(x, w, targets, bias=b, **OPTIONS, chunk_size=3), (x, weight, bias)
    )


def of_low_precision(dtype, tokens, device):
    *leaves, targets = problem(tokens=tokens, hidden=48, vocabulary=2100, dtype=dtype, device=device)
    return leaves, targets.clamp(min=0)


@functools.cache  # every backend of a device asks for the same
def eager_and_exact(dtype, tokens, device):
    leaves, targets = of_low_precision(dtype, tokens, device)

    def eager(x, w, b):
        logp = torch.log_softmax(torch.nn.functional.linear(x, w, b) / 0.8, -1)
        return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    return results_and_gradients(eager, *leaves), exact(*leaves, targets, {"temperature": 0.8})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [64, 1030])
def test_low_precision_inputs_are_as_exact_as_eager(place, dtype, tokens):
    backend, device = place
    leaves, targets = of_low_precision(dtype, tokens, device)
    ours = results_and_gradients(
        lambda x, w, b: linear_logprobs(
            x, w, targets, bias=b, temperature=0.8, return_entropy=True, backend=backend
        ),
        *leaves,
    )
    assert [value.dtype for value in ours] == [torch.float32, torch.float32, dtype, dtype, dtype]
    for mine, peer, truth in zip(ours, *eager_and_exact(dtype, tokens, device), strict=True):
        assert_as_exact_as(mine.cpu(), peer.cpu(), truth, mine.dtype)


def test_the_gradient_of_the_head_is_not_summed_in_16_bits(place):
    backend, device = place
    tokens = 2048
    hidden = torch.full((tokens, 1), 1.0, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    linear_logprobs(hidden, weight, targets, chunk_size=4, backend=backend).sum().backward()
    # d sum logp / d w_0 = tokens (1 - 1/2); sums of ones in bfloat16 stop growing at 256
    assert weight.grad.flatten().tolist() == [tokens / 2, -tokens / 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save_logits", [False, True])
def test_only_what_needs_a_gradient_gets_one(place, dtype, save_logits):
    backend, device = place
    *leaves, targets = problem(tokens=1030, vocabulary=2100, dtype=dtype, device=device)

    def gradients(needed):
        inputs = [leaf.detach().requires_grad_(wanted) for leaf, wanted in zip(leaves, needed, strict=True)]
        x, w, b = inputs
        logp = linear_logprobs(x, w, targets, bias=b, save_logits=save_logits, backend=backend)
        logp.sum().backward()
        return [leaf.grad for leaf in inputs]

    full = gradients((True, True, True))
    for needed in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        for grad, whole, wanted in zip(gradients(needed), full, needed, strict=True):
            assert (grad is not None) == wanted
            if wanted:
                tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                assert_close([grad], [whole.cpu().double()], tolerance)


def test_one_upstream_gradient_alone(place):
    backend, device = place
    *leaves, targets = problem(device=device)

    def gradients(use):
        logp, entropy = linear_logprobs(
            leaves[0], leaves[1], targets, bias=leaves[2], return_entropy=True, backend=backend
        )
        return torch.autograd.grad(use(logp, entropy), leaves)

    both = gradients(lambda logp, entropy: logp.sum() + entropy.sum())
    alone = zip(
        gradients(lambda logp, entropy: logp.sum()),
        gradients(lambda logp, entropy: entropy.sum()),
        strict=True,
    )
    for whole, (first, second) in zip(both, alone, strict=True):
        torch.testing.assert_close(first + second, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("save_logits", [False, True])
def test_a_graph_that_is_kept_gives_the_same_gradient_twice(place, save_logits):
    backend, device = place
    *leaves, targets = problem(device=device)
    logp = linear_logprobs(
        leaves[0], leaves[1], targets, bias=leaves[2], save_logits=save_logits, backend=backend
    )
    first = torch.autograd.grad(logp.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(logp.sum(), leaves)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_second_derivative_is_refused(place):
    backend, device = place
    if backend == "reference":
        pytest.skip("the reference refuses it inside token_logprobs, where it is tested")
    x, weight, _, targets = problem(device=device)
    logp = linear_logprobs(x, weight, targets, backend=backend)
    (grad,) = torch.autograd.grad(logp.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs: a second derivative is not implemented"):
        grad.square().sum().backward()


def test_ignored_tokens_and_masked_vocabulary(place):
    """A bias of -inf masks a token of the vocabulary; a target there has log-prob -inf."""
    backend, device = place
    x, weight, bias, targets = problem(device=device)
    bias = bias.detach().clone()
    bias[10:20] = -torch.inf
    targets[:3] = torch.tensor([5, -100, 15])
    targets[3:] = 30
    logp, entropy = linear_logprobs(x, weight, targets, bias=bias, return_entropy=True, backend=backend)
    assert logp[1] == 0 and entropy[1] == 0 and logp[2] == -torch.inf
    grad_x, grad_w = torch.autograd.grad(logp[[0, *range(3, 11)]].sum() + entropy.sum(), (x, weight))
    assert torch.isfinite(entropy).all() and torch.isfinite(grad_x).all() and (grad_x[1] == 0).all()
    assert (grad_w[10:20] == 0).all() and (grad_w[30] != 0).all()
    kept = [i for i in range(37) if not 10 <= i < 20]
    place_of = torch.tensor([kept.index(int(y)) if int(y) in kept else -100 for y in targets])
    plain = exact(x, weight[kept], bias[kept], place_of, {})
    rows = place_of != -100
    assert_close([logp[rows], entropy[rows]], [plain[0][rows], plain[1][rows]])


@pytest.mark.parametrize("save_logits", [False, True])
def test_the_hidden_states_of_ignored_tokens_may_hold_anything(place, save_logits):
    backend, device = place
    *leaves, targets = problem(device=device)
    dirty = leaves[0].detach().clone()
    dirty[1], dirty[5] = torch.nan, torch.inf
    assert targets[1] == targets[5] == -100

    def function(x, w, b):
        how = {"save_logits": save_logits, "return_entropy": True, "backend": backend}
        return linear_logprobs(x, w, targets, bias=b, **how)

    ours = results_and_gradients(function, dirty.requires_grad_(), *leaves[1:])
    assert_close(ours, exact(*leaves, targets, {}))


@pytest.mark.parametrize("layout", ["expanded hidden", "sliced hidden", "turned weight", "strided targets"])
def test_any_strides(place, layout):
    backend, device = place
    x, weight, bias, targets = (tensor.detach() for tensor in problem(device=device))
    if layout == "expanded hidden":
        x = x[:1].expand(11, 6)
    elif layout == "sliced hidden":
        x = x.repeat(1, 2)[:, 1:12:2]
    elif layout == "turned weight":
        weight = weight.t().contiguous().t()
    else:
        targets = targets.repeat_interleave(2)[::2]
    views = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    packed = [tensor.detach().contiguous().clone().requires_grad_() for tensor in (x, weight, bias)]
    ours, plain = (
        results_and_gradients(
            lambda x, w, b, y=y: linear_logprobs(x, w, y, bias=b, return_entropy=True, backend=backend),
            *leaves,
        )
        for leaves, y in ((views, targets), (packed, targets.contiguous()))
    )
    assert_close(ours, [value.cpu().double() for value in plain], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hidden", "vocabulary"), [(70, 333), (33, 5001)])
def test_batch_invariant_rows_have_the_same_bits_in_any_company(place, dtype, hidden, vocabulary):
    backend, device = place
    x, weight, bias, targets = problem(150, hidden, vocabulary, dtype, device=device)
    options = {"batch_invariant": True, "return_entropy": True, "bias": bias, "backend": backend}
    order = torch.randperm(150, device=device)
    with torch.no_grad():
        every = linear_logprobs(x, weight, targets, **options)
        calls = [
            (order, {"chunk_size": 13}),
            (torch.arange(5, 7, device=device), {}),
            (torch.arange(149, 150, device=device), {"chunk_size": 1}),
            (torch.arange(150, device=device).flip(0), {"chunk_size": 100}),
        ]
        for rows, how in calls:
            some = linear_logprobs(x[rows], weight, targets[rows], **how, **options)
            for whole, part in zip(every, some, strict=True):
                assert same_bits(whole[rows], part), how
        unaligned = torch.cat((x.new_zeros(1, hidden), x)).flatten()[hidden:].view(150, hidden)
        assert same_bits(linear_logprobs(unaligned, weight, targets, **options)[0], every[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_agree_bit_for_bit_and_threads_move_no_invariant_bit(place, dtype):
    backend, device = place
    *leaves, targets = problem(1030, 40, 2100, dtype, device=device)

    def run(**how):
        return results_and_gradients(
            lambda x, w, b: linear_logprobs(
                x, w, targets, bias=b, return_entropy=True, backend=backend, **how
            ),
            *leaves,
        )

    first, second = run(), run()
    assert all(same_bits(one, other) for one, other in zip(first, second, strict=True))
    before = torch.get_num_threads()
    invariant = run(batch_invariant=True)[:2]
    try:
        torch.set_num_threads(3)
        threaded = run(batch_invariant=True)[:2]
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(one, other) for one, other in zip(invariant, threaded, strict=True))


def test_statistics_that_come_along(place):
    backend, device = place
    x, weight, bias, targets = problem(tokens=40, device=device)
    logits = x.detach().cpu().double() @ weight.detach().cpu().double().T + bias.detach().cpu().double()
    targets[0], targets[2] = logits[0].argmax(), logits[2].argmax()
    values = oracle.of_logits(logits, oracle.Head(), targets.cpu(), 1.3)[2:]
    expected = dict(zip(STATS, values, strict=True))
    names = ("is_top1", "log_sum_sq_probs", "mean_logits")
    logp, stats = linear_logprobs(
        x, weight, targets, bias=bias, temperature=1.3, stats=names, backend=backend
    )
    assert list(stats) == list(names) and stats["is_top1"].dtype == torch.bool
    assert torch.equal(stats["is_top1"].cpu(), expected["is_top1"]) and stats["is_top1"][0]
    for name in ("log_sum_sq_probs", "mean_logits"):
        assert_close([stats[name]], [expected[name]])
    assert not any(value.requires_grad for value in stats.values()) and logp.requires_grad
    with torch.no_grad():
        x[2] = torch.nan
    _, stats = linear_logprobs(x, weight, targets, stats=("mean_logits",), backend=backend)
    assert stats["mean_logits"].isnan().nonzero().flatten().tolist() == [2]


def test_autocast_casts_as_linear_does(place):
    backend, device = place
    x, weight, bias, targets = problem(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        under = linear_logprobs(x, weight, targets, bias=bias, backend=backend)
    narrow = [tensor.bfloat16() for tensor in (x, weight, bias)]
    by_hand = linear_logprobs(narrow[0], narrow[1], targets, bias=narrow[2], backend=backend)
    assert under.dtype == torch.float32 and same_bits(under, by_hand)
    grads = torch.autograd.grad(under.sum(), (x, weight, bias))
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(place, shape, dtype):
    backend, device = place
    x = torch.zeros(*shape, 6, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 6, device=device, dtype=dtype, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.int64, device=device)
    logp, entropy = linear_logprobs(x, weight, targets, return_entropy=True, backend=backend)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == shape and x.grad.shape == x.shape and (weight.grad == 0).all()
