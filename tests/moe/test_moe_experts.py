"""The reference of grouped_gemm and moe_experts against float64 loops and closed forms, and errors for bad input.

test_experts_backends.py tests every backend; this file has float64, second derivatives and both forms of the reference.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import r1kernels
from r1kernels import checks
from r1kernels.moe import grouped_gemm, moe_experts, sort_by_expert
from tests.support.moe_case import NAMES, Case, LoraCase, check_clamped_gates, in_eager, normal
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.unchecked_offsets import assert_every_row_is_written


@pytest.fixture(autouse=True)
def reference():
    with r1kernels.use_backend("reference"):
        yield


@pytest.fixture(params=["by expert", "by tile"])
def form(request, monkeypatch):
    """Both forms of the reference: the one for visible values, and the one that compiled graphs trace."""
    if request.param == "by tile":
        monkeypatch.setattr(checks, "values_visible", lambda *tensors: False)
    return request.param


SHAPES = {
    "odd": (7, 5, 3, 7, 3),
    "2I == H": (9, 8, 4, 5, 2),
    "K = E": (6, 4, 3, 5, 5),
    "K = 1": (11, 4, 6, 3, 1),
    "one token": (1, 6, 5, 13, 2),
    "one expert": (5, 6, 5, 1, 1),
    "idle experts": (4, 6, 5, 31, 2),
    "many tokens": (97, 12, 6, 4, 2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(form, shape):
    case = Case(*shape)
    for name, ours, exact in zip(NAMES, case.run(moe_experts), case.exact(), strict=True):
        torch.testing.assert_close(ours, exact, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("indices", ["all on one", "duplicates"])
def test_uneven_choices(form, indices):
    chosen = {"all on one": torch.full((6, 2), 3), "duplicates": torch.tensor([[1, 1], [0, 1]] * 3)}[indices]
    case = Case(6, 5, 3, 4, 2, indices=chosen)
    results = case.run(moe_experts)
    for ours, exact in zip(results, case.exact(), strict=True):
        torch.testing.assert_close(ours, exact)
    idle = [expert for expert in range(4) if expert not in chosen]
    assert all((grad[idle] == 0).all() for grad in results[3:])


def test_closed_form_backward():
    # what a kernel computes: dS = <dA', A>, dW2 = sum (s dO)^T A, dW1 = sum dPre^T X, dX = sum dPre W1
    case = Case(10, 6, 4, 5, 2)
    _, d_hidden, d_weights, d_gate_up, d_down = case.run(moe_experts)
    x, s, w1, w2 = (leaf.detach() for leaf in case.leaves)
    d_x, d_s, d_w1, d_w2 = (torch.zeros_like(leaf) for leaf in (x, s, w1, w2))
    for t in range(10):
        for k, e in enumerate(case.indices[t].tolist()):
            gate, up = (w1[e] @ x[t]).chunk(2)
            a = F.silu(gate) * up
            d_a_unscaled = case.grad[t] @ w2[e]
            d_s[t, k] = d_a_unscaled @ a
            d_w2[e] += torch.outer(s[t, k] * case.grad[t], a)
            sigma = gate.sigmoid()
            d_a = s[t, k] * d_a_unscaled
            # silu'(g) = sigma (1 + g (1 - sigma))
            d_pre = torch.cat((d_a * up * sigma * (1 + gate * (1 - sigma)), d_a * F.silu(gate)))
            d_w1[e] += torch.outer(d_pre, x[t])
            d_x[t] += d_pre @ w1[e]
    for ours, expected in zip((d_hidden, d_weights, d_gate_up, d_down), (d_x, d_s, d_w1, d_w2), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save", ["hidden", "nothing"])
def test_as_exact_as_eager(form, dtype, save):
    # bfloat16 and float16 with float32 routing weights, as DeepSeek-V3 and Mixtral pass them
    case = Case(96, 64, 48, 8, 4, dtype=dtype)
    results = case.run(lambda *arguments: moe_experts(*arguments, save=save))
    eager = case.run(in_eager)
    for name, ours, theirs, exact in zip(NAMES, results, eager, case.exact(), strict=True):
        assert ours.dtype == (torch.float32 if name == "weights" else dtype)
        assert_as_exact_as(ours, theirs, exact, dtype)


@pytest.mark.parametrize("save", ["hidden", "nothing"])
def test_second_derivatives(form, save):
    case = Case(2, 2, 1, 3, 2)

    def run(hidden, weights, gate_up, down):
        return moe_experts(hidden, case.indices, weights, gate_up, down, save=save)

    assert torch.autograd.gradcheck(run, case.leaves)
    assert torch.autograd.gradgradcheck(run, case.leaves)


def test_saving_nothing_gives_the_same_bits_and_keeps_only_the_arguments():
    case = Case(64, 32, 48, 4, 2, dtype=torch.float32)
    for first, second in zip(
        case.run(moe_experts), case.run(lambda *a: moe_experts(*a, save="nothing")), strict=True
    ):
        assert same_bits(first, second)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        moe_experts(*case.arguments(), save="nothing")
    assert sum(saved) <= sum(argument.numel() for argument in case.arguments())


def test_no_tokens(form):
    case = Case(0, 6, 5, 3, 2)
    out, *grads = case.run(moe_experts)
    assert out.shape == (0, 6)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in case.leaves]
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(("hidden", "intermediate"), [(0, 3), (5, 0)])
def test_matrices_without_elements(form, hidden, intermediate):
    case = Case(6, max(hidden, 1), max(intermediate, 1), 4, 2)
    x, indices, weights, gate_up, down = case.arguments()
    leaves = x[:, :hidden], weights, gate_up[:, : 2 * intermediate, :hidden], down[:, :hidden, :intermediate]
    out = moe_experts(leaves[0], indices, *leaves[1:])
    assert out.shape == (6, hidden) and (out == 0).all()
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("all_rows", [False, True])
def test_sentinels_of_expert_parallelism(form, all_rows):
    case = Case(6, 5, 3, 4, 2)
    away = torch.ones(6, 2, dtype=torch.bool) if all_rows else torch.tensor([[True, False], [True, True]] * 3)
    case.indices = case.indices.masked_fill(away, 4)
    # the weight of a sentinel is 0 by contract; even a NaN must not reach the output
    case.weights = case.weights.detach().masked_fill(away, torch.nan).requires_grad_()
    out, d_hidden, d_weights, d_gate_up, d_down = case.run(moe_experts)
    case.weights = case.weights.detach().masked_fill(away, 0.0).requires_grad_()
    for ours, exact in zip((out, d_hidden, d_weights, d_gate_up, d_down), case.exact(), strict=True):
        torch.testing.assert_close(ours, exact)
    assert (d_weights[away] == 0).all()
    nowhere = away.all(1)
    assert (out[nowhere] == 0).all() and (d_hidden[nowhere] == 0).all()


def test_nothing_leaks_between_rows_and_experts(form):
    case = Case(8, 5, 3, 6, 2, indices=torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]] * 2))
    clean = case.run(moe_experts)
    with torch.no_grad():
        case.gate_up[5], case.down[5] = torch.nan, torch.inf  # no token goes there
        case.hidden[3] = torch.nan  # goes to experts 3 and 4
    out, d_hidden, d_weights, d_gate_up, d_down = case.run(moe_experts)
    others = [0, 1, 2, 4, 5, 6, 7]
    for ours, expected in zip((out, d_hidden, d_weights), clean, strict=False):
        torch.testing.assert_close(ours[others], expected[others])
        assert ours[3].isnan().all()
    for ours, expected in zip((d_gate_up, d_down), clean[3:], strict=True):
        torch.testing.assert_close(ours[:3], expected[:3])
        assert ours[3:5].isnan().any() and (ours[5] == 0).all()


def test_repeated_runs_agree_bit_for_bit(form):
    case = Case(40, 16, 12, 6, 3, dtype=torch.bfloat16)
    for first, second in zip(case.run(moe_experts), case.run(moe_experts), strict=True):
        assert same_bits(first, second)


def test_strides_do_not_matter(form):
    case = Case(12, 8, 6, 4, 2, dtype=torch.float32)
    expected = moe_experts(*case.arguments())
    hidden, indices, weights, gate_up, down = (argument.detach() for argument in case.arguments())
    strided = (
        hidden.t().contiguous().t(),
        indices.t().contiguous().t(),
        weights.t().contiguous().t(),
        gate_up.transpose(1, 2).contiguous().transpose(1, 2),
        down.transpose(0, 2).contiguous().transpose(0, 2),
    )
    assert not any(argument.is_contiguous() for argument in strided)
    torch.testing.assert_close(moe_experts(*strided), expected)
    broadcast = weights[:1].expand(12, 2)
    torch.testing.assert_close(
        moe_experts(hidden, indices, broadcast, gate_up, down),
        moe_experts(hidden, indices, broadcast.contiguous(), gate_up, down),
    )


def test_unaligned_weights():
    case = Case(12, 7, 5, 4, 2, dtype=torch.float32)
    expected = moe_experts(*case.arguments())
    moved = []
    for weight in (case.gate_up, case.down):
        file = torch.empty(weight.numel() * 4 + 2, dtype=torch.uint8)  # as in a memory-mapped file
        file[2:] = weight.detach().flatten().view(torch.uint8)
        moved.append(torch.frombuffer(file.numpy(), dtype=torch.float32, offset=2).view(weight.shape))
        assert moved[-1].data_ptr() % 4
    torch.testing.assert_close(moe_experts(case.hidden, case.indices, case.weights, *moved), expected)


@pytest.mark.parametrize("frozen", range(4), ids=NAMES[1:])
def test_frozen_arguments(form, frozen):
    case = Case(8, 5, 3, 4, 2)
    expected = case.run(moe_experts)[1:]
    case.leaves[frozen].requires_grad_(False)
    live = [leaf for leaf in case.leaves if leaf.requires_grad]
    grads = torch.autograd.grad(moe_experts(*case.arguments()), live, case.grad)
    for ours, grad in zip(grads, [g for i, g in enumerate(expected) if i != frozen], strict=True):
        torch.testing.assert_close(ours, grad)


def test_weights_computed_from_other_parameters():
    # as PEFT's target_parameters does: W + B A, where only A and B train
    case = Case(8, 5, 3, 4, 2)
    a, b = normal(4, 2, 5, seed=6).requires_grad_(), normal(4, 6, 2, seed=7).requires_grad_()
    case.gate_up.requires_grad_(False)
    out = moe_experts(case.hidden, case.indices, case.weights, case.gate_up + b @ a, case.down)
    grads = torch.autograd.grad(out, (a, b), case.grad)
    whole = (case.gate_up + b @ a).detach().requires_grad_()
    out = moe_experts(case.hidden, case.indices, case.weights, whole, case.down)
    (full,) = torch.autograd.grad(out, whole, case.grad)
    torch.testing.assert_close(grads, (b.detach().mT @ full, full @ a.detach().mT))


def test_lora_is_that_of_the_whole_matrices(form):
    case = LoraCase(9, 8, 6, 4, 2)
    for ours, exact in zip(case.with_lora(moe_experts), case.exact(), strict=True):
        torch.testing.assert_close(ours, exact)


def test_second_derivatives_of_lora():
    case = LoraCase(2, 3, 1, 2, 2, ranks=(1, 2))

    def run(hidden, weights, gate_up, down, *matrices):
        lora = (*matrices, case.scale)
        return moe_experts(hidden, case.indices, weights, gate_up, down, lora=lora)

    assert torch.autograd.gradcheck(run, case.leaves)
    assert torch.autograd.gradgradcheck(run, case.leaves)


def test_autocast_is_that_of_linear(form):
    case = Case(16, 8, 6, 4, 2, dtype=torch.float32)
    half = [leaf.detach().bfloat16() for leaf in (case.hidden, case.gate_up, case.down)]
    expected = moe_experts(half[0], case.indices, case.weights, half[1], half[2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = case.run(moe_experts)
        mixed = moe_experts(case.hidden, case.indices, case.weights, half[1], half[2])
        linear = F.linear(case.hidden, case.gate_up[0])
        order = sort_by_expert(case.indices, 4)
        rows = grouped_gemm(case.hidden[order.permutation // 2], case.gate_up, order.offsets)
    assert same_bits(results[0], expected) and same_bits(mixed, expected)
    assert results[0].dtype == rows.dtype == linear.dtype
    assert all(grad.dtype == torch.float32 for grad in results[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_clamped_and_shifted_gates(dtype):
    check_clamped_gates(moe_experts, dtype)


def test_what_a_clamp_keeps():
    # H = I = 1 and weights of 1: gate and up are x
    x = torch.tensor([[-9.0], [-1.0], [2.0], [9.0], [torch.nan]], requires_grad=True)
    indices, weights = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    ones = torch.ones(1, 2, 1), torch.ones(1, 1, 1)
    out = moe_experts(x, indices, weights, *ones, limit=2.0)
    out[:4].sum().backward()
    silu = [value / (1 + math.exp(-value)) for value in (-9.0, -1.0, 2.0)]
    expected = torch.tensor([silu[0] * -2, silu[1] * -1, silu[2] * 2, silu[2] * 2])
    torch.testing.assert_close(out[:4, 0].detach(), expected)
    assert out[4].isnan()
    assert x.grad[3] == 0 and (x.grad[:3] != 0).all()


def test_gelu():
    case = Case(6, 5, 3, 1, 1)
    out = moe_experts(*case.arguments(), activation="gelu_tanh")
    gate, up = F.linear(case.hidden, case.gate_up[0]).chunk(2, -1)
    expected = F.linear(F.gelu(gate, approximate="tanh") * up, case.down[0])
    torch.testing.assert_close(out, expected)  # one expert: its weight is 1


def test_compiled_takes_an_unknown_expert_for_a_sentinel():
    case = Case(6, 5, 3, 4, 2, dtype=torch.float32)
    compiled = torch.compile(moe_experts, backend="aot_eager", fullgraph=True)
    wild, safe = case.indices.clone(), case.indices.clone()
    wild[0], wild[1, 1], safe[0], safe[1, 1] = torch.tensor([9, -1]), 2**40, 4, 4
    hidden, _, weights, gate_up, down = case.arguments()
    torch.testing.assert_close(
        compiled(hidden, wild, weights, gate_up, down), moe_experts(hidden, safe, weights, gate_up, down)
    )


def test_meta_tensors_give_shapes():
    hidden, weights = torch.empty(6, 8, device="meta"), torch.empty(6, 2, device="meta")
    indices = torch.empty(6, 2, dtype=torch.int64, device="meta")
    out = moe_experts(
        hidden, indices, weights, torch.empty(4, 12, 8, device="meta"), torch.empty(4, 8, 6, device="meta")
    )
    assert out.shape == (6, 8) and out.is_meta


# --- grouped_gemm ---


@pytest.mark.parametrize("counts", [[2, 0, 5, 1], [0, 0, 0, 8], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_grouped_gemm(form, counts):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = int(offsets[-1]) + 3  # three rows of no expert
    x, weight = normal(rows, 5).requires_grad_(), normal(4, 6, 5, seed=1).requires_grad_()
    out = grouped_gemm(x, weight, offsets.int())
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    expected = torch.einsum("sn,smn->sm", x[: len(owner)], weight[owner])
    torch.testing.assert_close(out[: len(owner)], expected)
    assert (out[len(owner) :] == 0).all()
    grad = normal(rows, 6, seed=2)
    ours = torch.autograd.grad(out, (x, weight), grad)
    theirs = torch.autograd.grad(expected, (x, weight), grad[: len(owner)])
    torch.testing.assert_close(ours, theirs)


def test_grouped_gemm_of_rows_that_are_nobodys_and_not_finite(form):
    x = torch.full((4, 5), torch.nan).requires_grad_()
    weight = normal(2, 6, 5, dtype=torch.float32).requires_grad_()
    out = grouped_gemm(x, weight, torch.zeros(3, dtype=torch.int32))
    out.sum().backward()
    assert (out == 0).all() and (x.grad == 0).all() and (weight.grad == 0).all()


def test_grouped_gemm_compiled_with_offsets_nobody_can_check():
    assert_every_row_is_written(torch.compile(grouped_gemm, backend="aot_eager", fullgraph=True))


X, W = torch.zeros(4, 3), torch.zeros(2, 5, 3)
BAD_GEMM = {
    "x: expected 2 dimensions": (ValueError, (X[0], W, torch.tensor([0, 2, 4]))),
    "weight: expected shape": (ValueError, (X, W[..., :2], torch.tensor([0, 2, 4]))),
    "weight: expected at least one expert": (ValueError, (X, W[:0], torch.tensor([0]))),
    "weight: expected dtype float32, got torch.float64": (
        TypeError,
        (X, W.double(), torch.tensor([0, 2, 4])),
    ),
    "offsets: expected shape": (ValueError, (X, W, torch.tensor([0, 4]))),
    "offsets: expected dtype": (TypeError, (X, W, torch.tensor([0.0, 2.0, 4.0]))),
    "offsets: expected ascending .* got 1 at position 2": (ValueError, (X, W, torch.tensor([0, 2, 1]))),
    "offsets: expected ascending .* got 5 at position 2": (ValueError, (X, W, torch.tensor([0, 2, 5]))),
    "offsets: expected 0 at position 0, got 1": (ValueError, (X, W, torch.tensor([1, 2, 4]))),
}


@pytest.mark.parametrize("message", BAD_GEMM)
def test_grouped_gemm_bad_input(message):
    error, arguments = BAD_GEMM[message]
    with pytest.raises(error, match=message):
        grouped_gemm(*arguments)


BAD = {
    "hidden: expected 2 dimensions": (ValueError, {"hidden": torch.zeros(1, 6, 8)}),
    "hidden: expected dtype": (TypeError, {"hidden": torch.zeros(6, 8, dtype=torch.int8)}),
    "indices: expected dtype": (TypeError, {"indices": torch.zeros(6, 2)}),
    r"indices: expected shape \(6, any\)": (ValueError, {"indices": torch.zeros(5, 2, dtype=torch.int64)}),
    "indices: expected shape .* got K = 0": (ValueError, {"indices": torch.zeros(6, 0, dtype=torch.int64)}),
    r"indices: expected values in \[0, 4\) or 4, got 5 at position \(2, 1\)": (
        IndexError,
        {"indices": torch.tensor([[0, 4], [1, 2], [3, 5], [0, 0], [0, 0], [-1, 0]])},
    ),
    "weights: expected shape": (ValueError, {"weights": torch.zeros(6, 3)}),
    "gate_up: expected shape": (ValueError, {"gate_up": torch.zeros(4, 8, 12)}),
    r"gate_up: expected shape \(E, 2 \* I, H\)": (ValueError, {"gate_up": torch.zeros(4, 5, 8)}),
    "gate_up: expected dtype float32": (TypeError, {"gate_up": torch.zeros(4, 12, 8, dtype=torch.bfloat16)}),
    "down: expected shape": (ValueError, {"down": torch.zeros(4, 6, 8)}),
    "down: expected dtype float32": (TypeError, {"down": torch.zeros(4, 8, 6, dtype=torch.float64)}),
    "activation: expected one of 'silu', 'gelu_tanh', got 'relu'": (ValueError, {"activation": "relu"}),
    "alpha: expected 1 for activation 'gelu_tanh', got 2": (
        ValueError,
        {"activation": "gelu_tanh", "alpha": 2},
    ),
    "alpha: expected a number above 0, got 0": (ValueError, {"alpha": 0}),
    "limit: expected a number above 0, got -1": (ValueError, {"limit": -1}),
    "shift: expected a finite number, got inf": (ValueError, {"shift": float("inf")}),
    "save: expected one of 'hidden', 'nothing'": (ValueError, {"save": "all"}),
    r"lora: expected a tuple \(A_up, B_up, A_down, B_down, scale\) or None, got int": (
        TypeError,
        {"lora": 2},
    ),
    "lora: scale: expected a number, got str": (TypeError, {"lora": (None, None, None, None, "2")}),
    "lora: A_up, lora: B_up: expected both or neither, got one alone": (
        ValueError,
        {"lora": (torch.zeros(4, 3, 8), None, None, None, 1.0)},
    ),
    r"lora: A_up: expected shape \(4, any, 8\), got \(4, 8, 3\)": (
        ValueError,
        {"lora": (torch.zeros(4, 8, 3), torch.zeros(4, 3, 12), None, None, 1.0)},
    ),
    r"lora: B_down: expected shape \(4, 8, 2\), got \(4, 8, 3\)": (
        ValueError,
        {"lora": (None, None, torch.zeros(4, 2, 6), torch.zeros(4, 8, 3), 1.0)},
    ),
    "lora: A_down: expected a rank of at least 1": (
        ValueError,
        {"lora": (None, None, torch.zeros(4, 0, 6), torch.zeros(4, 8, 0), 1.0)},
    ),
    "lora: A_down: expected dtype float32": (
        TypeError,
        {"lora": (None, None, torch.zeros(4, 2, 6).half(), torch.zeros(4, 8, 2).half(), 1.0)},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    error, arguments = BAD[message]
    good = {
        "hidden": torch.zeros(6, 8),
        "indices": torch.zeros(6, 2, dtype=torch.int64),
        "weights": torch.zeros(6, 2),
        "gate_up": torch.zeros(4, 12, 8),
        "down": torch.zeros(4, 8, 6),
    }
    with pytest.raises(error, match=message):
        moe_experts(**{**good, **arguments})
