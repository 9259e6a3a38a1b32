"""The C++ kernels of the MoE family: what is special to them, beyond the contract that every backend is tested for.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows. Every instruction set
has its own copy, and test_instruction_sets.py runs the tests of all backends once for each.
"""

from __future__ import annotations

import math

import pytest
import torch

import r1kernels
from r1kernels import extension
from r1kernels.moe import moe_experts, route
from r1kernels.moe.experts import NO_LORA
from tests.support.moe_case import Case, LoraCase
from tests.support.numerics import same_bits
from tests.support.redzones import Redzones

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ops = torch.ops.r1kernels
SILU = (0, 1.0, math.inf, 0.0, False)  # activation, alpha, limit, shift, batch_invariant
NEEDS = (
    *(True,) * 4,
    *(False,) * 4,
)  # the gradients of hidden, weights, gate_up and down, none of a low-rank addition


def forward_arguments(case):
    hidden, indices, weights, gate_up, down = (argument.detach() for argument in case.arguments())
    return hidden, indices, weights.float(), gate_up, down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 5, 3, 7, 3), (40, 37, 19, 3, 2), (1, 18, 35, 5, 4)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_nothing_outside_the_arguments_is_read(dtype, shape, offset):
    """Arguments between NaN, at aligned addresses and at odd ones, give the bits of plain arguments."""
    case = LoraCase(*shape, dtype=dtype)
    plain = (*forward_arguments(case), *(matrix.detach() for matrix in case.matrices))
    zones = Redzones()
    placed = tuple(zones.input(argument, offset=offset) for argument in plain)
    grad = zones.input(case.grad, offset=offset)
    results = []
    for given, upstream in ((plain, case.grad), (placed, grad)):
        arguments, lora = given[:5], (*given[5:], case.scale)
        out, *order = ops.moe_experts_cpu(*arguments, *SILU, True, *lora)
        hidden, _, *others = arguments
        options = (*SILU, *(True,) * 8, *lora)
        backward = ops.moe_experts_cpu_backward
        *grads, of_lora = backward(upstream, hidden, *others, *order, *options)
        *again, of_lora_again = backward(upstream, hidden, *others, order[0][:0], *order[1:], *options)
        grads, again = (*grads, *of_lora), (*again, *of_lora_again)
        results.append((out, *order, *grads))
        assert all(same_bits(first, second) for first, second in zip(grads, again, strict=True))
    zones.check()
    for first, second in zip(*results, strict=True):
        assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", range(3))
@pytest.mark.parametrize("normalize", [False, True])
def test_the_router_reads_nothing_outside_its_arguments(dtype, score, normalize):
    plain = torch.randn(5, 21).to(dtype), torch.randn(21)
    zones = Redzones()
    placed = tuple(zones.input(argument, offset=1) for argument in plain)
    results = []
    for logits, bias in (plain, placed):
        choice = ops.route_cpu(logits, 4, score, normalize, 1e-20, 2.5, False, bias, 3, 2, score != 1)
        grad = ops.route_cpu_backward(choice[0], logits, choice[1], score, normalize, 1e-20, 2.5)
        assert torch.isfinite(choice[0]).all() and torch.isfinite(grad).all()
        results.append((*choice, grad))
    zones.check()
    for first, second in zip(*results, strict=True):
        assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_do_not_depend_on_their_company_in_a_small_call(dtype):
    # up to 24 rows of an expert one kernel serves them all: a token alone gets the bits that it gets among others
    case = Case(12, 40, 36, 4, 2, dtype=dtype)
    hidden, indices, weights, gate_up, down = forward_arguments(case)
    together = moe_experts(hidden, indices, weights, gate_up, down, backend="cpu")
    for token in range(12):
        one = slice(token, token + 1)
        alone = moe_experts(hidden[one], indices[one], weights[one], gate_up, down, backend="cpu")
        assert same_bits(alone, together[one])


def test_large_gradients_in_use_are_not_given_again():
    # their memory is kept for the next call, once they are free
    logits = torch.randn(2048, 256)
    _, indices, _ = ops.route_cpu(logits, 8, 0, True, 1e-20, 1.0)
    backward = (logits, indices, 0, True, 1e-20, 1.0)
    first = ops.route_cpu_backward(torch.randn(2048, 8), *backward)
    rows, copy = first[100:], first[100:].clone()
    del first
    second = ops.route_cpu_backward(torch.randn(2048, 8), *backward)
    assert same_bits(rows, copy) and not torch.equal(second[100:], copy)
    assert second.is_contiguous() and second.shape == logits.shape


def test_values_that_nobody_checked_are_errors():
    case = Case(6, 8, 5, 4, 2, dtype=torch.float32)
    hidden, indices, weights, gate_up, down = forward_arguments(case)
    for bad in (5, -1, 2**40):
        wild = indices.clone()
        wild[1, 1] = bad
        match = rf"indices: expected values in \[0, 4\) or 4, got {bad} at position 3"
        with pytest.raises(RuntimeError, match=match):
            ops.moe_experts_cpu(hidden, wild, weights, gate_up, down, *SILU, True, *NO_LORA)
        compiled = torch.compile(
            lambda i: moe_experts(hidden, i, weights, gate_up, down), backend="aot_eager", fullgraph=True
        )
        with pytest.raises(RuntimeError, match=match):
            compiled(wild)
    x, weight = torch.ones(4, 3), torch.ones(2, 5, 3)
    for offsets in ([0, 3, 2], [1, 2, 3], [0, 2, 5]):
        with pytest.raises(RuntimeError, match="offsets: expected"):
            ops.grouped_gemm_cpu(x, weight, torch.tensor(offsets, dtype=torch.int32), False, False)
    with pytest.raises(RuntimeError, match=r"indices: expected values in \[0, 3\), got 3 at position 0"):
        ops.route_cpu_backward(torch.ones(1, 1), torch.zeros(1, 3), torch.tensor([[3]]), 0, True, 1e-20, 1.0)
    with pytest.raises(RuntimeError, match="score: expected 0, 1 or 2, got 3"):
        ops.route_cpu_backward(torch.ones(1, 1), torch.zeros(1, 3), torch.tensor([[0]]), 3, True, 1e-20, 1.0)
    out, pre, offsets, permutation, inverse = ops.moe_experts_cpu(
        hidden, indices, weights, gate_up, down, *SILU, True, *NO_LORA
    )
    with pytest.raises(RuntimeError, match="expected what the forward returned"):
        ops.moe_experts_cpu_backward(
            out,
            hidden,
            weights,
            gate_up,
            down,
            pre,
            offsets,
            permutation + 9,
            inverse,
            *SILU,
            *NEEDS,
            *NO_LORA,
        )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": torch.zeros(6, 8, dtype=torch.float64)}, "hidden: expected float32, bfloat16 or float16"),
        ({"hidden": torch.zeros(8, 6).t()}, "hidden: expected a contiguous tensor"),
        ({"indices": torch.zeros(6, 2, dtype=torch.int32)}, "indices: wrong dtype"),
        ({"indices": torch.zeros(5, 2, dtype=torch.int64)}, "indices: expected size 6 at dimension 0, got 5"),
        ({"weights": torch.zeros(6, 2, dtype=torch.bfloat16)}, "weights: wrong dtype"),
        ({"gate_up": torch.zeros(4, 10, 7)}, "gate_up: expected size 8 at dimension 2, got 7"),
        ({"down": torch.zeros(4, 8, 5, dtype=torch.bfloat16)}, "down: wrong dtype"),
        ({"activation": 2}, "activation: expected 0 or 1, got 2"),
        ({"up_a": torch.zeros(4, 2, 8)}, "up_a, up_b: expected both or neither"),
        ({"up_a": torch.zeros(4, 0, 8), "up_b": torch.zeros(4, 10, 0)}, "none of them empty"),
        (
            {"down_a": torch.zeros(4, 2, 5), "down_b": torch.zeros(4, 8, 3)},
            "down_b: expected size 2 at dimension 2, got 3",
        ),
        ({"hidden": torch.zeros(6, 0), "gate_up": torch.zeros(4, 10, 0)}, "expected no empty size"),
    ],
)
def test_the_op_itself_checks_what_the_kernels_trust(change, text):
    call = {
        "hidden": torch.zeros(6, 8),
        "indices": torch.zeros(6, 2, dtype=torch.int64),
        "weights": torch.zeros(6, 2),
        "gate_up": torch.zeros(4, 10, 8),
        "down": torch.zeros(4, 8, 5),
        "activation": 0,
        "alpha": 1.0,
        "limit": math.inf,
        "shift": 0.0,
        "batch_invariant": False,
        "keep": True,
        **NO_LORA._asdict(),
    }
    with pytest.raises(RuntimeError, match=text):
        ops.moe_experts_cpu(**(call | change))


def test_opcheck():
    dtype = torch.bfloat16  # not float32, which the weights and their gradients are in
    case = LoraCase(9, 8, 6, 4, 2, dtype=dtype)
    arguments = forward_arguments(case)
    hidden, indices, *others = arguments
    lora = (*(matrix.detach() for matrix in case.matrices), case.scale)
    for keep, low in ((True, lora), (False, NO_LORA)):
        torch.library.opcheck(ops.moe_experts_cpu.default, (*arguments, *SILU, keep, *low))
        _, *saved = ops.moe_experts_cpu(*arguments, *SILU, keep, *low)
        for needs in ((True,) * 8, (False, True) * 4):
            backward = (case.grad, hidden, *others, *saved, *SILU, *needs, *low)
            torch.library.opcheck(ops.moe_experts_cpu_backward.default, backward)
    offsets = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    torch.library.opcheck(ops.grouped_gemm_cpu.default, (hidden, others[1], offsets, False, False))
    rows = torch.randn(9, 12).to(dtype)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.grouped_gemm_cpu_backward.default, (rows, hidden, others[1], offsets, False, *needs)
        )
    transposed = (rows, others[1], offsets, True)
    torch.library.opcheck(ops.grouped_gemm_cpu.default, (*transposed, False))
    torch.library.opcheck(ops.grouped_gemm_cpu_backward.default, (hidden, *transposed, True, True))
    torch.library.opcheck(ops.sort_by_expert_cpu.default, (indices.flatten(), 4))
    for given in (None, indices):
        torch.library.opcheck(
            ops.route_cpu.default, (rows, 2, 1, True, 0.0, 1.0, False, None, 1, 1, False, given)
        )
    weights = torch.randn(9, 2)
    torch.library.opcheck(ops.route_cpu_backward.default, (weights, rows, indices, 1, False, 0.0, 1.0))


def test_it_is_chosen_on_the_cpu_and_says_what_it_leaves_to_the_reference():
    case = Case(4, 8, 6, 4, 2, dtype=torch.float32)
    assert "cpu        runs" in r1kernels.explain(moe_experts, *case.arguments())
    assert "cpu        runs" in r1kernels.explain(route, torch.zeros(2, 4), 2)
    wide = Case(4, 8, 6, 4, 2)
    text = r1kernels.explain(moe_experts, *wide.arguments())
    assert "cpu        cannot run: hidden: float64 is served by the reference alone" in text
    text = r1kernels.explain(
        moe_experts, torch.zeros(4, 0), *case.arguments()[1:3], torch.zeros(4, 12, 0), torch.zeros(4, 0, 6)
    )
    assert "cpu        cannot run: matrices without elements" in text
