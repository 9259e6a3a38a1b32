"""route on every backend: weights, gradients, replay, arguments; test_route_choice.py has the choice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import r1kernels
from r1kernels.moe import route
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.routing_cases import FAMILIES, check_special_logits, families, normal

pytestmark = pytest.mark.usefixtures("backend")


def test_worked_example():
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4; the bias makes expert 2 the best, its weight stays 1/2
    logits = torch.tensor([[0.0, math.log(3.0), 0.0, math.log(3.0)]])
    routing = route(logits, 2, bias=torch.tensor([0.0, 0.0, 1.0, 0.1]), scale=2.5)
    assert routing.indices.tolist() == [[2, 3]]
    torch.testing.assert_close(routing.weights, torch.tensor([[1.0, 1.5]]))
    assert routing.tokens_per_expert.tolist() == [0, 0, 1, 1]
    softmax = route(logits, 2, score="softmax", normalize=False)  # 3/8 for experts 1 and 3
    assert softmax.indices.tolist() == [[1, 3]]
    torch.testing.assert_close(softmax.weights, torch.tensor([[0.375, 0.375]]))


@pytest.mark.parametrize("backend", ["reference"], indirect=True)  # the only one that serves float64
@families
@pytest.mark.parametrize("replay", [False, True])
def test_gradients_in_float64(options, replay):
    logits = normal(3, 8, dtype=torch.float64).requires_grad_()
    indices = torch.randint(0, 8, (3, options["top_k"]), generator=torch.Generator().manual_seed(3))
    recorded = indices if replay else None
    assert torch.autograd.gradcheck(lambda z: route(z, indices=recorded, **options).weights, logits)
    assert torch.autograd.gradgradcheck(lambda z: route(z, indices=recorded, **options).weights, logits)


def test_closed_form_backward_of_the_sigmoid_router():
    logits = normal(20, 8, dtype=torch.float64).requires_grad_()
    options = FAMILIES["deepseek-v3"]
    routing = route(logits, bias=normal(8, seed=1).double(), **options)
    g = normal(20, 3, seed=2, dtype=torch.float64)
    (grad,) = torch.autograd.grad(routing.weights, logits, g)
    p = logits.detach().sigmoid().gather(1, routing.indices)
    n = p.sum(1, keepdim=True) + 1e-20
    dp = options["scale"] / n * (g - (g * p).sum(1, keepdim=True) / n)
    expected = torch.zeros(20, 8, dtype=torch.float64).scatter(1, routing.indices, dp * p * (1 - p))
    torch.testing.assert_close(grad, expected)


def test_closed_form_backward_of_the_softmax_routers():
    logits = normal(20, 8, dtype=torch.float64).requires_grad_()
    g = normal(20, 4, seed=2, dtype=torch.float64)
    renormalised = route(logits, 4, score="softmax")
    (grad,) = torch.autograd.grad(renormalised.weights, logits, g)
    w = renormalised.weights.detach()
    torch.testing.assert_close(w, logits.detach().gather(1, renormalised.indices).softmax(-1))
    expected = torch.zeros(20, 8, dtype=torch.float64)
    expected.scatter_(1, renormalised.indices, w * (g - (g * w).sum(1, keepdim=True)))
    torch.testing.assert_close(grad, expected)

    plain = route(logits, 4, score="softmax", normalize=False)
    (grad,) = torch.autograd.grad(plain.weights, logits, g)
    p = logits.detach().softmax(-1)
    scattered = torch.zeros(20, 8, dtype=torch.float64).scatter(1, plain.indices, g)
    torch.testing.assert_close(grad, p * (scattered - (scattered * p).sum(1, keepdim=True)))


@families
def test_replay_of_the_own_choice_changes_nothing(options):
    logits = normal(30, 8).requires_grad_()
    live = route(logits, **options)
    replayed = route(logits, indices=live.indices, **options)
    assert same_bits(live.weights, replayed.weights)
    assert torch.equal(live.tokens_per_expert, replayed.tokens_per_expert)
    g = normal(*live.weights.shape, seed=2)
    (first,) = torch.autograd.grad(live.weights, logits, g)
    (second,) = torch.autograd.grad(replayed.weights, logits, g)
    assert same_bits(first, second)


def test_replay_counts_duplicates_twice():
    logits = torch.tensor([[0.0, math.log(3.0), 1.0]], requires_grad=True)
    routing = route(logits, 3, indices=torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(routing.weights, torch.tensor([[0.375, 0.375, 0.25]]))
    assert routing.tokens_per_expert.tolist() == [1, 2, 0]
    (grad,) = torch.autograd.grad(routing.weights[:, :2].sum(), logits)
    # w = 2 p / (2 p + q), p = 3/4, q = 1/2: dw/dp = 2 q / 4 = 1/4, times p (1 - p) = 3/16
    torch.testing.assert_close(grad[0, 1], torch.tensor(3 / 64))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_replay_of_hopeless_experts_stays_finite(score):
    logits = torch.tensor([[200.0, -200.0, -200.0]], requires_grad=True)
    routing = route(logits, 2, score=score, indices=torch.tensor([[1, 2]]))
    routing.weights.square().sum().backward()
    expected = [[0.0, 0.0]] if score == "sigmoid" else [[0.5, 0.5]]  # both scores underflow to 0
    assert routing.weights.tolist() == expected
    assert torch.isfinite(logits.grad).all()


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_routed_in_float32(options, dtype):
    logits = normal(40, 8).to(dtype).requires_grad_()
    wide = logits.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = route(logits, **options)
    expected = route(wide, **options)
    assert same_bits(routing.weights, expected.weights)
    assert torch.equal(routing.indices, expected.indices)
    routing.weights.square().sum().backward()
    expected.weights.square().sum().backward()
    assert same_bits(logits.grad, wide.grad.to(dtype))


@families
def test_strides_do_not_matter(options):
    logits = normal(8, 2, 30).transpose(0, 2)[:, 0]
    assert not logits.is_contiguous()
    for ours, expected in zip(route(logits, **options), route(logits.contiguous(), **options), strict=True):
        assert same_bits(ours, expected)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_all_one_and_no_token(score):
    everything = route(normal(5, 6), 6, score=score)
    assert torch.equal(everything.indices.sort(1).values, torch.arange(6).expand(5, 6))
    assert everything.tokens_per_expert.tolist() == [5] * 6
    single = route(normal(5, 1), 1, score=score)
    torch.testing.assert_close(single.weights, torch.ones(5, 1))
    logits = normal(0, 6).requires_grad_()
    empty = route(logits, 2, score=score, n_group=3, topk_group=2)
    assert empty.weights.shape == (0, 2) and empty.indices.shape == (0, 2)
    assert empty.tokens_per_expert.tolist() == [0] * 6
    empty.weights.sum().backward()
    assert logits.grad.shape == (0, 6)


@families
def test_nan_and_infinite_logits(options):
    def run(logits, **options):
        leaf = logits.clone().requires_grad_()
        weights, indices, _ = route(leaf, **options)
        (grad,) = torch.autograd.grad(weights, leaf, normal(*weights.shape, seed=2))
        return weights.detach(), indices, grad

    check_special_logits(run, options)


@families
def test_the_gradient_of_nan_weights_is_nan(options):
    logits = normal(3, 8)
    logits[1, 5] = torch.nan
    leaf = logits.clone().requires_grad_()
    weights, indices, _ = route(leaf, **options)
    (grad,) = torch.autograd.grad(weights.square().sum(), leaf)
    assert torch.equal(grad[1].isnan()[indices[1]], weights[1].isnan())
    assert grad[[0, 2]].isfinite().all()


def test_the_bias_gets_no_gradient():
    bias = torch.zeros(8, requires_grad=True)
    logits = normal(4, 8).requires_grad_()
    (grad,) = torch.autograd.grad(route(logits, 2, bias=bias).weights.sum(), bias, allow_unused=True)
    assert grad is None


def test_compiled():
    def plain(z, b):
        return [route(z, bias=b, **options) for options in FAMILIES.values()]

    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    logits, bias = normal(12, 8).requires_grad_(), normal(8, seed=1)
    for traced, eager in zip(compiled(logits, bias), plain(logits, bias), strict=True):
        for ours, expected in zip(traced, eager, strict=True):
            assert same_bits(ours, expected)
        (first,) = torch.autograd.grad(traced.weights.square().sum(), logits, retain_graph=True)
        (second,) = torch.autograd.grad(eager.weights.square().sum(), logits)
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_an_index_nobody_can_check_gets_no_weight_and_no_count(score, backend):
    compiled = torch.compile(
        lambda z, i: route(z, 2, score=score, indices=i), backend="aot_eager", fullgraph=True
    )
    logits = normal(3, 4).requires_grad_()
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"indices: expected values in \[0, 4\), got 4 at position 1"):
            compiled(logits, torch.tensor([[0, 4], [-1, 3], [9, -5]]))
        return
    routing = compiled(logits, torch.tensor([[0, 4], [-1, 3], [9, -5]]))
    torch.testing.assert_close(routing.weights, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    assert routing.tokens_per_expert.tolist() == [1, 0, 0, 1]
    routing.weights.square().sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[2] == 0).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_invariants(data):
    experts = data.draw(st.integers(1, 40))
    tokens = data.draw(st.integers(0, 20))
    top_k = data.draw(st.integers(1, experts))
    score = data.draw(st.sampled_from(["sigmoid", "softmax"]))
    logits = normal(tokens, experts, seed=data.draw(st.integers(0, 10**6)))
    routing = route(logits, top_k, score=score, scale=2.0)
    assert int(routing.tokens_per_expert.sum()) == tokens * top_k
    assert all(len(set(row)) == top_k for row in routing.indices.tolist())
    torch.testing.assert_close(routing.weights.sum(1), torch.full((tokens,), 2.0))
    assert (routing.weights.diff(dim=1) <= 0).all()  # without a bias weights descend as scores do
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    permuted = route(logits[order], top_k, score=score, scale=2.0)
    assert same_bits(permuted.weights, routing.weights[order])
    assert torch.equal(permuted.indices, routing.indices[order])


LOGITS = torch.zeros(3, 8)
BAD = {
    "logits: expected 2 dimensions": (ValueError, {"logits": torch.zeros(8)}),
    "logits: expected at least one expert": (
        ValueError,
        {"logits": torch.zeros(0, 0), "indices": torch.zeros(0, 2, dtype=torch.int64)},
    ),
    "logits: expected dtype": (TypeError, {"logits": torch.zeros(3, 8, dtype=torch.int64)}),
    "logits: expected a torch.Tensor": (TypeError, {"logits": [[0.0]]}),
    "top_k: expected at least 1": (ValueError, {"top_k": 0}),
    "top_k: expected an int": (TypeError, {"top_k": 2.0}),
    "top_k: expected at most the 8 eligible": (ValueError, {"top_k": 9}),
    "top_k: expected at most the 4 eligible": (ValueError, {"top_k": 5, "n_group": 4, "topk_group": 2}),
    "score: expected one of 'sigmoid', 'softmax'": (ValueError, {"score": "relu"}),
    "bias: expected shape": (ValueError, {"bias": torch.zeros(7)}),
    "n_group: expected a divisor": (ValueError, {"n_group": 3}),
    "topk_group: expected at most n_group": (ValueError, {"n_group": 2, "topk_group": 3}),
    "normalize: expected a bool": (TypeError, {"normalize": 1}),
    "scale: expected a finite": (ValueError, {"scale": math.inf}),
    "indices: expected shape": (ValueError, {"indices": torch.zeros(3, 3, dtype=torch.int64)}),
    "indices: expected dtype": (TypeError, {"indices": torch.zeros(3, 2, dtype=torch.int32)}),
    r"indices: expected values in \[0, 8\), got 8 at position \(1, 0\)": (
        IndexError,
        {"indices": torch.tensor([[0, 1], [8, 2], [-1, 0]])},
    ),
    "backend: expected one of": (ValueError, {"backend": "tpu"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    error, arguments = BAD[message]
    with pytest.raises(error, match=message):
        route(**{"logits": LOGITS, "top_k": 2, **arguments})


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_eager(options, dtype):
    logits = (3 * normal(200, 64)).to(dtype)
    bias = normal(64, seed=1) / 50
    grad = normal(200, options["top_k"], seed=2)
    indices = route(logits, bias=bias, **options).indices

    def run(z, g):
        z = z.requires_grad_()
        weights = route(z, indices=indices, **options, backend="reference").weights
        return weights.detach(), *torch.autograd.grad(weights, z, g)

    ours = route(logits.requires_grad_(), bias=bias, **options)
    (d_logits,) = torch.autograd.grad(ours.weights, logits, grad)
    plain, exact = run(logits.detach(), grad), run(logits.detach().double(), grad.double())
    assert_as_exact_as(ours.weights, plain[0], exact[0], torch.float32)
    assert_as_exact_as(d_logits, plain[1], exact[1], dtype)


@families
def test_rows_do_not_depend_on_company_or_threads(options):
    logits, bias = normal(150, 8).requires_grad_(), normal(8, seed=1)
    grad = normal(150, options["top_k"], seed=2)

    def run(z, g):
        routing = route(z, bias=bias, **options)
        return routing.weights, routing.indices, *torch.autograd.grad(routing.weights, z, g)

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(logits, grad))
    finally:
        torch.set_num_threads(before)
    alone = run(logits[70:71], grad[70:71])
    for first, second, third, one in zip(*results, alone, strict=True):
        assert same_bits(first, second) and same_bits(first, third)
        assert same_bits(first[70:71], one)


def test_a_second_derivative_is_refused(backend):
    if backend == "reference":
        pytest.skip("the reference has second derivatives")
    logits = normal(4, 8).requires_grad_()
    (grad,) = torch.autograd.grad(route(logits, 2).weights.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="route: a second derivative is not implemented"):
        grad.sum().backward()


def test_backend_can_be_forced():
    routing = route(LOGITS, 2, backend="reference")
    with r1kernels.use_backend("reference", op="route"):
        assert same_bits(route(LOGITS, 2).weights, routing.weights)
    assert "reference" in r1kernels.explain("route")
