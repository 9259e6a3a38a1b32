"""What every backend of moe_experts and grouped_gemm has to show: exactness, gradients, and what breaks in practice.

A test class inherits ``MoeExpertsKernel``; a fixture ``backend`` gives the name of a backend that serves tensors on
``device`` there (in eager mode, or under an interpreter), and the sizes may be made smaller.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import r1kernels
from r1kernels.moe import grouped_gemm, moe_experts, sort_by_expert
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # tokens, hidden, intermediate, experts, top_k
    "odd, prime E": (37, 45, 23, 7, 3),
    "2I == H": (19, 64, 32, 5, 2),
    "K = E": (6, 40, 33, 5, 5),
    "K = 1": (41, 32, 48, 3, 1),
    "one token": (1, 66, 35, 13, 2),
    "one expert": (25, 48, 50, 1, 1),
    "idle experts": (4, 32, 40, 31, 2),
    "one of everything": (1, 1, 1, 1, 1),
    "several row blocks": (300, 32, 16, 2, 2),
    "several column blocks": (30, 300, 150, 2, 1),
}


LORA_SHAPES = {  # the ranks of both additions
    "odd, prime E": (3, 5),
    "2I == H": (16, 16),
    "idle experts": (8, 1),
    "several row blocks": (8, 40),
    "several column blocks": (2, 64),
}


class MoeExpertsKernel:
    device = "cpu"
    shapes = SHAPES
    tokens = 32  # of a call whose size does not matter; a multiple of 4
    draws = 8  # of a call of one token
    long = (1300, 1100)  # rows of an expert, and H: more than one block of the sums over them
    wide = (200, 160, 140, 6, 3)
    saved_tokens = 128

    @pytest.fixture(autouse=True)
    def serve(self, backend):
        """Inside the test the backend is preferred for every op, and tensors are made on the device."""
        on_device = contextlib.nullcontext() if self.device == "cpu" else torch.device(self.device)
        with on_device, r1kernels.use_backend(backend):
            yield

    def check_exactness(self, *cases, dtype):
        """Of several cases the results are taken together: the error of eager in a few numbers is luck."""
        ours, eager, exact = (
            [torch.stack(results) for results in zip(*(run(case) for case in cases), strict=True)]
            for run in (lambda case: case.run(moe_experts), lambda case: case.run(in_eager), Case.exact)
        )
        for name, mine, theirs, truth in zip(NAMES, ours, eager, exact, strict=True):
            assert mine.dtype == (torch.float32 if name == "weights" else dtype)
            assert_as_exact_as(mine, theirs, truth, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_values_and_gradients_are_as_exact_as_eager(self, backend, shape, dtype):
        draws = self.draws if self.shapes[shape][0] == 1 else 1
        cases = [Case(*self.shapes[shape], dtype=dtype, draw=draw) for draw in range(draws)]
        self.check_exactness(*cases, dtype=dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_long_sums(self, backend, dtype):
        rows, depth = self.long
        indices = torch.arange(rows)[:, None] % 100 // 99  # for expert 1 every hundredth token
        case = Case(rows, 16, 8, 2, 1, dtype=dtype, indices=indices)
        self.check_exactness(case, dtype=dtype)
        self.check_exactness(Case(self.tokens, depth, 8, 3, 2, dtype=dtype), dtype=dtype)

    @pytest.mark.parametrize("indices", ["all on one", "duplicates"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_uneven_choices(self, backend, indices, dtype):
        chosen = {
            "all on one": torch.full((self.tokens, 2), 3),
            "duplicates": torch.tensor([[1, 1], [0, 1]]).repeat(self.tokens // 2, 1),
        }[indices]
        case = Case(self.tokens, 33, 17, 5, 2, dtype=dtype, indices=chosen)
        self.check_exactness(case, dtype=dtype)
        idle = [expert for expert in range(5) if expert not in chosen]
        assert all((grad[idle] == 0).all() for grad in case.run(moe_experts)[3:])

    def test_gelu(self, backend):
        case = Case(self.tokens, 24, 19, 3, 2, dtype=torch.float32)
        results = case.run(lambda *arguments: moe_experts(*arguments, activation="gelu_tanh"))
        exact = case.exact(lambda gate: F.gelu(gate, approximate="tanh"))
        for ours, expected in zip(results, exact, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_clamped_and_shifted_gates(self, backend, dtype):
        check_clamped_gates(moe_experts, dtype)

    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    def test_gates_of_any_size(self, backend, activation):
        check_gates_of_any_size(moe_experts, activation)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_no_tokens(self, backend, dtype):
        check_no_tokens(moe_experts, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("all_rows", [False, True])
    @pytest.mark.parametrize("save", ["hidden", "nothing"])
    def test_sentinels_of_expert_parallelism(self, backend, all_rows, dtype, save):
        case = Case(self.tokens, 21, 11, 4, 2, dtype=dtype)
        away = (
            torch.ones(self.tokens, 2, dtype=torch.bool)
            if all_rows
            else torch.tensor([[True, False], [True, True]]).repeat(self.tokens // 2, 1)
        )
        case.indices = case.indices.masked_fill(away, 4)
        # the weight of a sentinel is 0 by contract; even a NaN must not reach the output
        case.weights = case.weights.detach().masked_fill(away, torch.nan).requires_grad_()
        results = case.run(lambda *arguments: moe_experts(*arguments, save=save))
        case.weights = case.weights.detach().masked_fill(away, 0.0).requires_grad_()
        eager = case.run(in_eager)
        for ours, theirs, exact in zip(results, eager, case.exact(), strict=True):
            assert_as_exact_as(ours, theirs, exact, dtype)
        out, d_hidden, d_weights, *_ = results
        assert (d_weights[away] == 0).all()
        nowhere = away.all(1)
        assert (out[nowhere] == 0).all() and (d_hidden[nowhere] == 0).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nothing_leaks_between_rows_and_experts(self, backend, dtype):
        chosen = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]]).repeat(self.tokens // 4, 1)
        case = Case(len(chosen), 35, 19, 6, 2, dtype=dtype, indices=chosen)
        clean = case.run(moe_experts)
        with torch.no_grad():
            case.gate_up[5], case.down[5] = torch.nan, torch.inf  # no token goes there
            case.hidden[3] = torch.nan  # goes to experts 3 and 4
        out, d_hidden, d_weights, d_gate_up, d_down = case.run(moe_experts)
        others = [token for token in range(len(chosen)) if token != 3]
        for ours, expected in zip((out, d_hidden, d_weights), clean, strict=False):
            assert same_bits(ours[others], expected[others])
            assert ours[3].isnan().all()
        for ours, expected in zip((d_gate_up, d_down), clean[3:], strict=True):
            assert same_bits(ours[:3], expected[:3])
            assert ours[3:5].isnan().any() and (ours[5] == 0).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("few", [False, True])
    def test_repeated_runs_agree_bit_for_bit(self, backend, dtype, few):
        tokens, *sizes = self.wide
        case = Case(3 if few else tokens, *sizes, dtype=dtype)
        for first, second in zip(case.run(moe_experts), case.run(moe_experts), strict=True):
            assert same_bits(first, second)

    def saved_bytes(self, function, parameters):
        held = {}
        known = {parameter.untyped_storage().data_ptr() for parameter in parameters}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in known:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function()
        del out
        return sum(held.values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_what_is_saved_for_the_backward(self, backend, dtype):
        if backend == "reference":
            pytest.skip("the reference keeps what autograd keeps")
        tokens, hidden, intermediate, top_k = self.saved_tokens, 256, 96, 4
        case = Case(tokens, hidden, intermediate, 8, top_k, dtype=dtype)
        parameters = (case.gate_up, case.down)
        kept = self.saved_bytes(lambda: moe_experts(*case.arguments()), parameters)
        needed = (tokens * hidden + tokens * top_k * 2 * intermediate) * dtype.itemsize
        assert kept <= 1.05 * needed
        nothing = self.saved_bytes(lambda: moe_experts(*case.arguments(), save="nothing"), parameters)
        # X, the order, the weights
        assert nothing <= 1.1 * tokens * hidden * dtype.itemsize + tokens * top_k * 12

    def test_no_copy_of_the_weights_is_saved(self, backend):
        if backend == "reference":
            pytest.skip("the reference keeps what autograd keeps")
        case = Case(self.tokens, 24, 16, 3, 2, dtype=torch.float32)
        gate_up, down = (
            weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            for weight in (case.gate_up, case.down)
        )
        hidden, indices, weights, *_ = case.arguments()
        kept = self.saved_bytes(lambda: moe_experts(hidden, indices, weights, gate_up, down), (gate_up, down))
        plain = self.saved_bytes(lambda: moe_experts(*case.arguments()), (case.gate_up, case.down))
        assert kept == plain

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_saving_nothing_and_checkpoints_give_the_same_bits(self, backend, dtype):
        case = Case(self.tokens, 40, 36, 4, 2, dtype=dtype)
        plain = case.run(moe_experts)
        for function in (
            lambda *arguments: moe_experts(*arguments, save="nothing"),
            lambda *arguments: checkpoint(moe_experts, *arguments, use_reentrant=False),
        ):
            for first, second in zip(plain, case.run(function), strict=True):
                assert same_bits(first, second)

    @pytest.mark.parametrize("save", ["hidden", "nothing"])
    @pytest.mark.parametrize("live", range(1, 15))
    def test_frozen_arguments(self, backend, live, save):
        case = Case(self.tokens, 24, 18, 4, 2, dtype=torch.float32)
        expected = case.run(moe_experts)[1:]
        for place, leaf in enumerate(case.leaves):
            leaf.requires_grad_(bool(live >> place & 1))
        leaves = [leaf for leaf in case.leaves if leaf.requires_grad]
        grads = torch.autograd.grad(moe_experts(*case.arguments(), save=save), leaves, case.grad)
        wanted = [grad for place, grad in enumerate(expected) if live >> place & 1]
        for ours, grad in zip(grads, wanted, strict=True):
            assert same_bits(ours, grad)

    def test_weights_computed_from_other_parameters(self, backend):
        # as PEFT's target_parameters does: W + B A, where only A and B train
        case = Case(self.tokens, 12, 10, 4, 2, dtype=torch.float32)
        a = torch.randn(4, 2, 12, requires_grad=True)
        b = torch.randn(4, 20, 2, requires_grad=True)
        frozen = case.gate_up.detach()
        out = moe_experts(case.hidden, case.indices, case.weights, frozen + b @ a, case.down)
        grads = torch.autograd.grad(out, (a, b), case.grad)
        whole = (frozen + b @ a).detach().requires_grad_()
        out = moe_experts(case.hidden, case.indices, case.weights, whole, case.down)
        (full,) = torch.autograd.grad(out, whole, case.grad)
        torch.testing.assert_close(grads, (b.detach().mT @ full, full @ a.detach().mT))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_strides_do_not_matter(self, backend, dtype):
        case = Case(self.tokens, 18, 16, 4, 2, dtype=dtype)
        plain = case.run(moe_experts)
        case.hidden = case.hidden.detach().t().contiguous().t().requires_grad_()
        case.indices = case.indices.t().contiguous().t()
        case.weights = case.weights.detach().t().contiguous().t().requires_grad_()
        case.gate_up = case.gate_up.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        case.down = case.down.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
        case.grad = case.grad.t().contiguous().t()
        assert not any(argument.is_contiguous() for argument in case.arguments())
        for ours, expected in zip(case.run(moe_experts), plain, strict=True):
            torch.testing.assert_close(ours, expected)
        expanded = case.weights.detach()[:1].expand(self.tokens, 2)
        assert same_bits(
            moe_experts(case.hidden, case.indices, expanded, case.gate_up, case.down),
            moe_experts(case.hidden, case.indices, expanded.contiguous(), case.gate_up, case.down),
        )

    def test_autocast_is_that_of_linear(self, backend):
        case = Case(self.tokens, 18, 16, 4, 2, dtype=torch.float32)
        half = [leaf.detach().bfloat16() for leaf in (case.hidden, case.gate_up, case.down)]
        expected = moe_experts(half[0], case.indices, case.weights, half[1], half[2])
        with torch.autocast(self.device, dtype=torch.bfloat16):
            results = case.run(moe_experts)
            mixed = moe_experts(case.hidden, case.indices, case.weights, half[1], half[2])
            order = sort_by_expert(case.indices, 4)
            rows = grouped_gemm(case.hidden[order.permutation // 2], case.gate_up, order.offsets)
        assert same_bits(results[0], expected) and same_bits(mixed, expected)
        assert rows.dtype == torch.bfloat16
        assert all(grad.dtype == torch.float32 for grad in results[1:])

    @pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_routing_weights_of_another_dtype(self, backend, weights_dtype):
        case = Case(self.tokens, 18, 16, 4, 2, dtype=torch.bfloat16)
        case.weights = case.weights.detach().to(weights_dtype).requires_grad_()
        results = case.run(moe_experts)
        assert results[2].dtype == weights_dtype
        case.weights = case.weights.detach().float().requires_grad_()
        for ours, expected in zip(results, case.run(moe_experts), strict=True):
            torch.testing.assert_close(ours.float(), expected.float(), rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize("save", ["hidden", "nothing"])
    def test_compiled(self, backend, save):
        compiled = torch.compile(lambda *a: moe_experts(*a, save=save), backend="aot_eager", fullgraph=True)
        first = Case(13, 8, 6, 4, 2, dtype=torch.float32)
        for of_tokens in first.arguments()[:3]:
            torch._dynamo.mark_dynamic(of_tokens, 0)
        for ours, eager in zip(first.run(compiled), first.run(moe_experts), strict=True):
            torch.testing.assert_close(ours, eager)
        with torch._dynamo.config.patch(error_on_recompile=True):  # another token count, another load
            second = Case(31, 8, 6, 4, 2, dtype=torch.float32)
            for ours, eager in zip(second.run(compiled), second.run(moe_experts), strict=True):
                torch.testing.assert_close(ours, eager)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", LORA_SHAPES)
    def test_lora_is_as_exact_as_eager(self, backend, shape, dtype):
        case = LoraCase(*self.shapes[shape], ranks=LORA_SHAPES[shape], dtype=dtype)
        for name, ours, theirs, exact in zip(
            LORA_NAMES, case.with_lora(moe_experts), case.in_eager(), case.exact(), strict=True
        ):
            assert ours.dtype == (torch.float32 if name == "weights" else dtype)
            assert_as_exact_as(ours, theirs, exact, dtype)

    @pytest.mark.parametrize("save", ["hidden", "nothing"])
    def test_lora_of_sentinels_and_idle_experts(self, backend, save):
        case = LoraCase(self.tokens, 21, 11, 5, 2, dtype=torch.float32)
        case.indices = case.indices.masked_fill(case.indices == 3, 5)
        results = case.with_lora(moe_experts, save=save)
        case.weights = case.weights.detach().masked_fill(case.indices == 5, 0.0).requires_grad_()
        for ours, theirs, exact in zip(results, case.in_eager(), case.exact(), strict=True):
            assert_as_exact_as(ours, theirs, exact, torch.float32)
        assert all((grad[3] == 0).all() for grad in results[3:])

    @pytest.mark.parametrize("save", ["hidden", "nothing"])
    @pytest.mark.parametrize("live", [(4,), (5,), (6,), (7,), (0, 5), (1, 6)], ids=str)
    def test_lora_of_frozen_arguments(self, backend, live, save):
        case = LoraCase(self.tokens, 24, 18, 4, 2, dtype=torch.float32)
        expected = case.with_lora(moe_experts)[1:]
        for place, leaf in enumerate(case.leaves):
            leaf.requires_grad_(place in live)
        leaves = [case.leaves[place] for place in live]
        out = moe_experts(*case.arguments(), lora=case.lora, save=save)
        for place, grad in zip(live, torch.autograd.grad(out, leaves, case.grad), strict=True):
            assert same_bits(grad, expected[place])

    @pytest.mark.parametrize("pair", ["gate_up", "down"])
    def test_lora_of_one_of_the_two(self, backend, pair):
        case = LoraCase(self.tokens, 24, 18, 4, 2, dtype=torch.float32)
        up_a, up_b, down_a, down_b, scale = case.lora
        nothing = torch.zeros_like(down_b if pair == "gate_up" else up_b)
        half, full = (
            ((up_a, up_b, None, None, scale), (up_a, up_b, down_a, nothing, scale))
            if pair == "gate_up"
            else ((None, None, down_a, down_b, scale), (up_a, nothing, down_a, down_b, scale))
        )
        live = [*case.leaves[:4], *((up_a, up_b) if pair == "gate_up" else (down_a, down_b))]
        results = []
        for lora in (half, full):
            out = moe_experts(*case.arguments(), lora=lora)
            results.append((out.detach(), *torch.autograd.grad(out, live, case.grad)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_lora_that_adds_nothing_moves_no_bit(self, backend, dtype):
        plain = Case(self.tokens, 40, 36, 4, 2, dtype=dtype).run(moe_experts)
        case = LoraCase(self.tokens, 40, 36, 4, 2, dtype=dtype)
        with torch.no_grad():
            case.matrices[1].zero_()
            case.matrices[3].zero_()
        for ours, expected in zip(case.with_lora(moe_experts), plain, strict=False):
            assert same_bits(ours, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
    def test_what_lora_saves_for_the_backward(self, backend, dtype):
        if backend == "reference":
            pytest.skip("the reference keeps what autograd keeps")
        tokens, hidden, intermediate, top_k, rank = self.saved_tokens, 256, 96, 4, 8
        case = LoraCase(tokens, hidden, intermediate, 8, top_k, ranks=(rank, rank), dtype=dtype)
        for leaf in (case.gate_up, case.down):
            leaf.requires_grad_(False)
        kept = self.saved_bytes(
            lambda: moe_experts(*case.arguments(), lora=case.lora), (case.gate_up, case.down, *case.matrices)
        )
        rows = tokens * top_k
        needed = (tokens * hidden + rows * 2 * intermediate + 2 * rows * rank) * dtype.itemsize
        assert kept <= 1.1 * needed

    def test_lora_under_a_checkpoint_and_with_nothing_saved_gives_the_same_bits(self, backend):
        case = LoraCase(self.tokens, 40, 36, 4, 2, dtype=torch.bfloat16)
        plain = case.with_lora(moe_experts)
        for results in (
            case.with_lora(moe_experts, save="nothing"),
            case.with_lora(
                lambda *arguments, lora: checkpoint(moe_experts, *arguments, lora=lora, use_reentrant=False)
            ),
        ):
            assert all(same_bits(first, second) for first, second in zip(plain, results, strict=True))

    def test_lora_compiled(self, backend):
        compiled = torch.compile(moe_experts, backend="aot_eager", fullgraph=True)
        case = LoraCase(13, 8, 6, 4, 2, dtype=torch.float32)
        for ours, eager in zip(case.with_lora(compiled), case.with_lora(moe_experts), strict=True):
            torch.testing.assert_close(ours, eager)

    def test_a_second_derivative_is_refused(self, backend):
        if backend == "reference":
            pytest.skip("the reference has second derivatives")
        case = Case(6, 5, 3, 4, 2, dtype=torch.float32)
        out = moe_experts(*case.arguments())
        grads = torch.autograd.grad(out, case.leaves, case.grad, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match="moe_experts: a second derivative is not implemented"):
                torch.autograd.grad(grad.sum(), case.hidden, retain_graph=True)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "counts", [[2, 0, 50, 1], [0, 0, 0, 8], [0, 0, 0, 0], [1, 1, 1, 1], [200, 30, 0, 7]]
    )
    def test_grouped_gemm(self, backend, counts, dtype):
        offsets = torch.tensor([0, *counts]).cumsum(0)
        rows = int(offsets[-1]) + 3  # three rows of no expert, which are not even finite
        x = torch.randn(rows, 45).to(dtype)
        x[int(offsets[-1]) :] = torch.nan
        x.requires_grad_()
        weight = (torch.randn(4, 36, 45) / 7).to(dtype).requires_grad_()
        grad = torch.randn(rows, 36).to(dtype)
        owner = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))

        def by_hand(x, weight, grad):
            out = [x[:0] @ weight[0].T]
            out += [F.linear(x[row : row + 1], weight[expert]) for row, expert in enumerate(owner.tolist())]
            out = torch.cat([*out, torch.zeros_like(grad[len(owner) :])])
            return out.detach(), *torch.autograd.grad(out, (x, weight), grad)

        out = grouped_gemm(x, weight, offsets.int())
        ours = (out.detach(), *torch.autograd.grad(out, (x, weight), grad))
        assert (out[len(owner) :] == 0).all() and (ours[1][len(owner) :] == 0).all()
        wide = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
        for mine, peer, exact in zip(
            ours, by_hand(x, weight, grad), by_hand(*wide, grad.double()), strict=True
        ):
            assert_as_exact_as(mine, peer, exact, dtype)
        for frozen in (x, weight):
            frozen.requires_grad_(False)
            live = weight if frozen is x else x
            (alone,) = torch.autograd.grad(grouped_gemm(x, weight, offsets), live, grad)
            assert same_bits(alone, ours[2 if live is weight else 1])
            frozen.requires_grad_()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_grouped_gemm_of_transposed_weights(self, backend, dtype):
        offsets = torch.tensor([0, 2, 2, 20, 21])
        x = torch.randn(22, 45).to(dtype).requires_grad_()
        weight = (torch.randn(4, 36, 45) / 7).to(dtype).requires_grad_()
        other = weight.detach().mT.contiguous().requires_grad_()
        grad = torch.randn(22, 36).to(dtype)
        plain = grouped_gemm(x, weight, offsets)
        out = grouped_gemm(x, other, offsets, transposed=True)
        torch.testing.assert_close(out, plain)
        d_x, d_weight = torch.autograd.grad(plain, (x, weight), grad)
        ours = torch.autograd.grad(out, (x, other), grad)
        torch.testing.assert_close(ours, (d_x, d_weight.mT))

    def test_grouped_gemm_compiled_and_derived_once(self, backend):
        x, weight = torch.randn(9, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
        offsets = torch.tensor([0, 4, 4, 8])
        compiled = torch.compile(grouped_gemm, backend="aot_eager", fullgraph=True)
        grad = torch.randn(9, 4)
        torch.testing.assert_close(compiled(x, weight, offsets), grouped_gemm(x, weight, offsets))
        ours = torch.autograd.grad(compiled(x, weight, offsets), (x, weight), grad)
        torch.testing.assert_close(
            ours, torch.autograd.grad(grouped_gemm(x, weight, offsets), (x, weight), grad)
        )
        if backend != "reference":
            out = grouped_gemm(x, weight, offsets)
            (first,) = torch.autograd.grad(out, x, grad, create_graph=True)
            with pytest.raises(RuntimeError, match="grouped_gemm: a second derivative is not implemented"):
                first.sum().backward()
