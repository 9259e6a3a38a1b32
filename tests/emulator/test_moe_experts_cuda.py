"""grouped_gemm and moe_experts of the backend cuda without a GPU: their kernels, launchers and order of launches under the
host emulator, behind the autograd functions of the backend.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows.
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

from r1kernels import extension
from r1kernels.moe import reference
from r1kernels.moe.experts import (
    ACTIVATIONS,
    GROUPED_GEMM,
    MOE_EXPERTS,
    NO_LORA,
    ExpertsCall,
    GemmCall,
    Lora,
)
from tests.support.emulated_experts import ELEMENTS, EmulatedExperts
from tests.support.forced import run_on
from tests.support.moe_case import (
    LORA_NAMES,
    NAMES,
    Case,
    LoraCase,
    check_clamped_gates,
    check_gates_of_any_size,
    check_no_tokens,
    in_eager,
)
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.unchecked_offsets import assert_every_row_is_written

OF_EACH_SIZE = (torch.float32, torch.bfloat16)  # float16 differs from bfloat16 in how values are converted


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("moe_experts")


@pytest.fixture(autouse=True)
def kernels(module):
    """The ops of the backend cuda take CPU tensors, by the emulator, while a test runs."""
    module.set_seed(0)
    emulated_ops = EmulatedExperts(module)
    library = torch.library.Library("r1kernels", "IMPL")
    emulated_ops.register(library)
    yield emulated_ops
    library._destroy()


def experts(
    *arguments,
    activation="silu",
    alpha=1.0,
    limit=math.inf,
    shift=0.0,
    lora=NO_LORA,
    save="hidden",
    backend="cuda",
):
    gating = (ACTIVATIONS.index(activation), alpha, limit, shift)
    call = ExpertsCall(*arguments, *gating, False, save == "hidden", Lora(*lora))
    return run_on(backend, MOE_EXPERTS, call)


def gemm(*arguments, transposed=False):
    return run_on("cuda", GROUPED_GEMM, GemmCall(*arguments, transposed, False))


def assert_exact(case, dtype):
    results = case.run(experts)
    for name, ours, theirs, exact in zip(NAMES, results, case.run(in_eager), case.exact(), strict=True):
        assert ours.dtype == (torch.float32 if name == "weights" else dtype)
        assert_as_exact_as(ours, theirs, exact, dtype)
    return results


SHAPES = {  # tokens, hidden, intermediate, experts, top_k
    "odd, prime E": (37, 45, 23, 7, 3),
    "2I == H": (19, 64, 32, 5, 2),
    "K = E": (6, 40, 33, 5, 5),
    "idle experts": (4, 32, 40, 13, 2),
    "one of everything": (1, 1, 1, 1, 1),
    "several column tiles": (9, 136, 72, 2, 1),
}


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_as_exact_as_eager(shape, dtype):
    assert_exact(Case(*shape, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_several_row_tiles_and_long_sums(dtype):
    # 145 rows of expert 0: of 16 bits one tile of 128 rows and a part of another
    indices = torch.cat((torch.zeros(145, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.int64)))
    assert_exact(Case(148, 24, 8, 2, 1, dtype=dtype, indices=indices), dtype)


def test_a_row_has_the_same_bits_in_tiles_of_any_size(module):
    dtype = torch.bfloat16
    many = Case(140, 56, 24, 1, 1, dtype=dtype)
    few = Case(140, 56, 24, 1, 1, dtype=dtype)
    few.hidden, few.grad = few.hidden.detach()[:20].requires_grad_(), few.grad[:20]
    few.indices, few.weights = few.indices[:20], few.weights.detach()[:20].requires_grad_()
    for rows, height in ((140, 128), (20, 64)):
        offsets = torch.tensor([0, rows], dtype=torch.int32)
        assert module.schedule(ELEMENTS.index(dtype), rows, 1, offsets.data_ptr())[0] == height
    for ours, alone in zip(many.run(experts)[:3], few.run(experts)[:3], strict=True):
        assert same_bits(ours[:20], alone)


@pytest.mark.parametrize("indices", ["all on one", "duplicates"])
@pytest.mark.parametrize("dtype", OF_EACH_SIZE, ids=str)
def test_uneven_choices(indices, dtype):
    chosen = {"all on one": torch.full((12, 2), 3), "duplicates": torch.tensor([[1, 1], [0, 1]] * 6)}[indices]
    results = assert_exact(Case(12, 33, 17, 5, 2, dtype=dtype, indices=chosen), dtype)
    idle = [expert for expert in range(5) if expert not in chosen]
    assert all((grad[idle] == 0).all() for grad in results[3:])


def test_gelu():
    case = Case(8, 24, 19, 3, 2, dtype=torch.float32)
    results = case.run(lambda *arguments: experts(*arguments, activation="gelu_tanh"))
    exact = case.exact(lambda gate: F.gelu(gate, approximate="tanh"))
    for ours, expected in zip(results, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", OF_EACH_SIZE, ids=str)
def test_clamped_and_shifted_gates(dtype):
    check_clamped_gates(experts, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_of_any_size(activation):
    check_gates_of_any_size(experts, activation)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_no_tokens(dtype):
    check_no_tokens(experts, dtype)


@pytest.mark.parametrize("dtype", OF_EACH_SIZE, ids=str)
@pytest.mark.parametrize("away", ["some", "all"])
@pytest.mark.parametrize("save", ["hidden", "nothing"])
def test_sentinels_of_expert_parallelism(away, dtype, save):
    case = Case(12, 21, 11, 4, 2, dtype=dtype)
    lost = {
        "all": torch.ones(12, 2, dtype=torch.bool),
        "some": torch.tensor([[True, False], [True, True]] * 6),
    }[away]
    case.indices = case.indices.masked_fill(lost, 4)
    # the weight of a sentinel is 0 by contract; even a NaN must not reach the output
    case.weights = case.weights.detach().masked_fill(lost, torch.nan).requires_grad_()
    results = case.run(lambda *arguments: experts(*arguments, save=save))
    case.weights = case.weights.detach().masked_fill(lost, 0.0).requires_grad_()
    for ours, theirs, exact in zip(results, case.run(in_eager), case.exact(), strict=True):
        assert_as_exact_as(ours, theirs, exact, dtype)
    out, d_hidden, d_weights, *_ = results
    assert (d_weights[lost] == 0).all()
    nowhere = lost.all(1)
    assert (out[nowhere] == 0).all() and (d_hidden[nowhere] == 0).all()


def test_what_is_saved_for_sentinels_is_written(module):
    case = Case(5, 16, 8, 3, 2, dtype=torch.bfloat16, indices=torch.full((5, 2), 3))
    arguments = [argument.detach() for argument in case.arguments()]
    _, kept, *_ = EmulatedExperts(module).experts(*arguments, 0, 1.0, math.inf, 0.0, False, True, *NO_LORA)
    assert kept.shape == (10, 16) and (kept == 0).all()


def test_indices_out_of_range_count_as_sentinels():
    wild, tame = Case(6, 9, 8, 4, 2, dtype=torch.float32), Case(6, 9, 8, 4, 2, dtype=torch.float32)
    wild.indices[0], wild.indices[3, 1] = torch.tensor([-1, 2**40]), 5
    tame.indices[0], tame.indices[3, 1] = 4, 4
    for ours, expected in zip(wild.run(experts), tame.run(experts), strict=True):
        assert same_bits(ours, expected)


@pytest.mark.parametrize("dtype", OF_EACH_SIZE, ids=str)
def test_nothing_leaks_between_rows_and_experts(dtype):
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]] * 3)
    case = Case(12, 35, 19, 6, 2, dtype=dtype, indices=chosen)
    clean = case.run(experts)
    with torch.no_grad():
        case.gate_up[5], case.down[5] = torch.nan, torch.inf  # no token goes there
        case.hidden[3] = torch.nan  # goes to experts 3 and 4
    out, d_hidden, d_weights, d_gate_up, d_down = case.run(experts)
    others = [token for token in range(12) if token != 3]
    for ours, expected in zip((out, d_hidden, d_weights), clean, strict=False):
        assert same_bits(ours[others], expected[others])
        assert ours[3].isnan().all()
    for ours, expected in zip((d_gate_up, d_down), clean[3:], strict=True):
        assert same_bits(ours[:3], expected[:3])
        assert ours[3:5].isnan().any() and (ours[5] == 0).all()


def test_frozen_arguments():
    case = Case(7, 12, 9, 3, 2, dtype=torch.float32)
    expected = case.run(experts)[1:]
    for live, save in product(range(1, 15), ("hidden", "nothing")):
        for place, leaf in enumerate(case.leaves):
            leaf.requires_grad_(bool(live >> place & 1))
        leaves = [leaf for leaf in case.leaves if leaf.requires_grad]
        wanted = [grad for place, grad in enumerate(expected) if live >> place & 1]
        grads = torch.autograd.grad(experts(*case.arguments(), save=save), leaves, case.grad)
        assert all(same_bits(ours, grad) for ours, grad in zip(grads, wanted, strict=True)), (live, save)


LORA_SHAPES = {  # as SHAPES, the ranks of both additions, and a dtype
    "odd": (9, 45, 23, 3, 2, (3, 5), torch.float16),
    "whole rows": (8, 64, 32, 3, 2, (16, 8), torch.bfloat16),
    "more than a step": (6, 24, 33, 2, 2, (40, 1), torch.float32),
    "several column tiles": (4, 136, 16, 1, 1, (136, 2), torch.bfloat16),
}


@pytest.mark.parametrize("shape", LORA_SHAPES.values(), ids=LORA_SHAPES)
def test_lora_is_as_exact_as_eager(shape):
    *sizes, ranks, dtype = shape
    case = LoraCase(*sizes, ranks=ranks, dtype=dtype)
    results = case.with_lora(experts)
    for name, ours, theirs, exact in zip(LORA_NAMES, results, case.in_eager(), case.exact(), strict=True):
        assert ours.dtype == (torch.float32 if name == "weights" else dtype)
        assert_as_exact_as(ours, theirs, exact, dtype)
    for ours, again in zip(results, case.with_lora(experts, save="nothing"), strict=True):
        assert same_bits(ours, again)


def test_lora_of_frozen_arguments_and_sentinels():
    case = LoraCase(7, 12, 9, 3, 2, dtype=torch.float32)
    case.indices = case.indices.masked_fill(case.indices == 1, 3)
    expected = case.with_lora(experts)[1:]
    for live, save in product([(4,), (5,), (6,), (7,), (0, 5), (1, 6)], ("hidden", "nothing")):
        for place, leaf in enumerate(case.leaves):
            leaf.requires_grad_(place in live)
        leaves = [case.leaves[place] for place in live]
        out = experts(*case.arguments(), lora=case.lora, save=save)
        for place, grad in zip(live, torch.autograd.grad(out, leaves, case.grad), strict=True):
            assert same_bits(grad, expected[place]), (live, save)
            assert place < 3 or (grad[1] == 0).all()


def test_no_order_of_threads_moves_a_bit_of_lora(module):
    case = LoraCase(5, 40, 24, 2, 2, dtype=torch.bfloat16)
    first, *others = (module.set_seed(seed) or case.with_lora(experts) for seed in range(3))
    for other in others:
        assert all(same_bits(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("sizes", [(32, 16), (34, 18)], ids=["whole rows", "odd rows"])
@pytest.mark.parametrize("dtype", OF_EACH_SIZE, ids=str)
def test_no_alignment_moves_a_bit(kernels, dtype, sizes):
    case = Case(9, *sizes, 2, 2, dtype=dtype)
    expected = case.run(experts)
    for offset in (1, 2):
        kernels.offset = offset
        assert all(same_bits(ours, plain) for ours, plain in zip(case.run(experts), expected, strict=True))


@pytest.mark.parametrize("dtype", OF_EACH_SIZE, ids=str)
def test_no_order_of_threads_blocks_and_copies_moves_a_bit(module, dtype):
    """A missing barrier, or a copy that no one waits for, shows as a difference between two orders."""
    case = Case(11, 136, 40, 3, 2, dtype=dtype)
    first, *others = (module.set_seed(seed) or case.run(experts) for seed in range(4))
    for other in others:
        assert all(same_bits(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_against_the_backend_cpu(dtype):
    case = Case(14, 40, 24, 5, 3, dtype=dtype)
    theirs = case.run(lambda *arguments: experts(*arguments, backend="cpu"))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, expected in zip(case.run(experts), theirs, strict=True):
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


# --- grouped_gemm ---


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("counts", "dtype"),
    [*product(([2, 0, 20, 1], [0, 0, 0, 0]), OF_EACH_SIZE), *(([70, 6, 0, 7], dtype) for dtype in ELEMENTS)],
    ids=str,
)
def test_grouped_gemm(counts, dtype, transposed):
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows = int(offsets[-1]) + 3  # three rows of no expert, which are not even finite
    x = torch.randn(rows, 45).to(dtype)
    x[int(offsets[-1]) :] = torch.nan
    x.requires_grad_()
    shape = (4, 45, 36) if transposed else (4, 36, 45)
    weight = (torch.randn(shape) / 7).to(dtype).requires_grad_()
    grad = torch.randn(rows, 36).to(dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]

    def run(function, leaves, grad):
        out = function(*leaves, offsets)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    def of_gemm(*call):
        return gemm(*call, transposed=transposed)

    ours = run(of_gemm, (x, weight), grad)
    peers, truth = (
        run(lambda *call: reference.grouped_gemm(GemmCall(*call, transposed, False)), (x, weight), grad),
        run(lambda *call: reference.grouped_gemm(GemmCall(*call, transposed, False)), wide, grad.double()),
    )
    for mine, peer, exact in zip(ours, peers, truth, strict=True):
        assert_as_exact_as(mine, peer, exact, dtype)
    owned = int(offsets[-1])
    assert (ours[0][owned:] == 0).all() and (ours[1][owned:] == 0).all()
    for live, expected in ((x, ours[1]), (weight, ours[2])):
        leaves = [leaf if leaf is live else leaf.detach() for leaf in (x, weight)]
        assert same_bits(torch.autograd.grad(of_gemm(*leaves, offsets), live, grad)[0], expected)


def test_offsets_that_nobody_checked():
    assert_every_row_is_written(gemm)


# --- the schedule ---


@pytest.mark.parametrize("experts", [1, 5, 511, 512, 1300])
@pytest.mark.parametrize(("dtype", "first"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 300)])
def test_tiles_cover_every_row_once(module, experts, dtype, first):
    generator = torch.Generator().manual_seed(experts)
    counts = torch.randint(0, 400, (experts,), generator=generator)
    counts = counts * (torch.rand(experts, generator=generator) < 0.5)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int()
    rows = int(offsets[-1]) + 77
    offsets += first
    rows += first
    height, tiles, bounds = module.schedule(ELEMENTS.index(dtype), rows, experts, offsets.data_ptr())
    assert bounds == [*offsets.tolist(), rows]
    expected = [
        (expert, start, min(start + height, end))
        for expert, (begin, end) in ((experts, (0, first)), *enumerate(pairwise(bounds)))
        for start in range(begin, end, height)
    ]
    assert tiles[: len(expected)] == expected
    assert all(tile == (-1, 0, 0) for tile in tiles[len(expected) :])
