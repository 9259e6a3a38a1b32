"""The Triton kernels of the router and of the order of experts in Triton's interpreter. Run by test_interpreter.py."""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import r1kernels
from r1kernels.moe import reference, triton_sort
from r1kernels.moe import route as public_route
from r1kernels.moe import sort_by_expert as public_sort
from tests.support import interpreter_bfloat16
from tests.support.forced import public_on
from tests.support.redzones import Redzones
from tests.support.routing_cases import FAMILIES, families, normal
from tests.support.routing_kernel import DTYPES, RoutingKernel, integers

interpreter_bfloat16.repair()
ops = torch.ops.r1kernels
SCHEMA = ("test_schema", "test_faketensor")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Few rows then make several tiles and rounds of loops."""
    for name, size in {"ROWS": 16, "FEW": 64, "MOST_TILES": 3, "SCANNED": 8}.items():
        monkeypatch.setattr(triton_sort, name, size)


@pytest.fixture
def backend():
    return "triton"


class TestRoutingTriton(RoutingKernel):
    """The interpreter is slow: few tokens, and fewer sizes. It runs a program for each token, one after the other."""

    tokens = 2
    test_a_row_has_the_same_bits_in_any_company = None

    @families
    def test_choice_weights_and_gradients(self, backend, options):
        self.check(backend, normal(2, 20), bias=normal(20, seed=1) - 2, **options)

    @pytest.mark.parametrize(
        ("name", "dtype"), [(name, DTYPES[place % 3]) for place, name in enumerate(FAMILIES)], ids=str
    )
    def test_as_exact_as_eager(self, backend, name, dtype):
        super().test_as_exact_as_eager(backend, FAMILIES[name], dtype)

    @pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("olmoe", "mistral4")])
    def test_nan_and_infinite_logits(self, backend, name):
        """Without the two whose scores and choices the others have."""
        super().test_nan_and_infinite_logits(backend, FAMILIES[name])

    @pytest.mark.parametrize("score", ["sigmoid", "softmax"])
    @pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 7), (33, 1), (1000, 2)])
    def test_sizes(self, backend, score, experts, top_k):
        self.check(backend, normal(1, experts), top_k=top_k, score=score, normalize=experts == 7)

    @pytest.mark.parametrize("rows", [0, 1, 33, 64, 65, 120])
    @pytest.mark.parametrize("experts", [1, 9])
    def test_order(self, backend, rows, experts):
        self.check_order(backend, integers(0, experts + 1, rows), experts)


MODELS = {  # E experts, and how many exponentials of float64 a token may cost: those of its weights, K or 2 K
    "deepseek-v3": (256, 16, {"top_k": 8, "score": "sigmoid", "n_group": 8, "topk_group": 4, "bias": True}),
    "sigmoid": (128, 16, {"top_k": 8, "score": "sigmoid"}),
    "qwen3": (128, 16, {"top_k": 8, "score": "softmax"}),
    "olmoe": (64, 16, {"top_k": 8, "score": "softmax", "normalize": False}),
    "deepseek-v2": (
        160,
        16,
        {"top_k": 6, "score": "softmax", "n_group": 8, "topk_group": 3, "normalize": False},
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_float64_is_for_the_experts_that_are_chosen(monkeypatch, model):
    """GPUs of consumers compute one value of float64 in the time of 64 of float32."""
    experts, most, options = MODELS[model]
    options = options | {"bias": normal(experts, seed=1) / 10 if "bias" in options else None}
    builder, wide = interpreter.InterpreterBuilder, []
    exp = builder.create_exp

    def counting(self, x):
        wide.extend([x.data.size] if x.data.dtype == np.float64 else [])
        return exp(self, x)

    monkeypatch.setattr(builder, "create_exp", counting)
    logits = normal(2, experts).requires_grad_()
    weights, indices, _ = public_on("triton", r1kernels.route, logits, **options)
    assert 0 < sum(wide) <= 2 * most
    wide.clear()
    torch.autograd.grad(weights.sum(), logits)
    assert 0 < sum(wide) <= 2 * 2 * most
    assert torch.equal(indices, public_route(logits, **options, backend="reference").indices)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steps", [1e-7, 1e-6, 1e-3])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_experts_that_are_close_are_in_the_order_of_their_exact_scores(score, steps, bias):
    """Logits on a grid, of which some fall together in float32 scores and some are equal."""
    logits = (integers(-4, 5, 5, 40, seed=3) * steps + 1).float()
    offsets = integers(-2, 3, 40, seed=4) * steps if bias else None
    for n_group, topk_group in ((1, 1), (4, 2)):
        options = {"score": score, "bias": offsets, "n_group": n_group, "topk_group": topk_group}
        ours = public_on("triton", r1kernels.route, logits, 6, **options)
        expected = public_route(logits, 6, **options, backend="reference")
        assert torch.equal(ours[1], expected.indices), (n_group, topk_group)


def test_nothing_outside_the_arguments_is_read():
    logits, bias = normal(2, 21), normal(21, seed=1)
    for score, normalize in ((0, True), (1, True), (1, False), (2, True)):
        results = []
        for place in (torch.clone, Redzones().input):
            selection = (False, place(bias), 3, 2, score != 1)
            choice = ops.route_triton(place(logits), 4, score, normalize, 1e-20, 2.5, *selection)
            grad = ops.route_triton_backward(
                place(choice[0]), place(logits), place(choice[1]), score, normalize, 1e-20, 2.5
            )
            results.append((*choice, grad))
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("rows", [40, 100])
def test_the_order_in_int32(rows):
    indices = integers(-1, 8, rows)
    ours = triton_sort.sort_rows(indices, 6, torch.int32)
    assert all(part.dtype == torch.int32 for part in ours)
    for part, exact in zip(ours, reference.sorted_rows(indices, 6), strict=True):
        assert torch.equal(part.long(), exact.long())


def test_the_ops_keep_their_schemas():
    logits, indices = normal(2, 8), integers(0, 8, 2, 3)
    for given in (None, indices):
        arguments = (logits, 3, 0, True, 1e-20, 2.5, False, None, 4, 2, True, given)
        torch.library.opcheck(ops.route_triton.default, arguments, test_utils=SCHEMA)
    backward = (normal(2, 3), logits, indices, 1, False, 1e-20, 1.0)
    torch.library.opcheck(ops.route_triton_backward.default, backward, test_utils=SCHEMA)
    torch.library.opcheck(ops.sort_by_expert_triton.default, (indices.flatten(), 8), test_utils=SCHEMA)


def test_the_public_functions_take_the_backend():
    logits, options = normal(2, 8), FAMILIES["deepseek-v3"]
    with r1kernels.use_backend("triton"):
        eager = public_route(logits, **options)
        order = public_sort(eager.indices, 8)
    expected = public_route(logits, **options, backend="reference")
    assert torch.equal(eager.indices, expected.indices)
    assert torch.equal(order.permutation, reference.sorted_rows(eager.indices.flatten(), 8)[1])


def test_more_experts_than_a_kernel_holds_are_left_to_the_reference():
    text = r1kernels.explain(public_route, torch.zeros(1, 2049), 2)
    assert "2049 experts are more than the 2048 that a GPU kernel chooses from" in text
