"""moe_experts and grouped_gemm on a GPU: both backends, and what only a GPU can show (streams, graphs, syncs, sizes, real bits).

Written for hardware that most machines lack: `pytest -m gpu`. T tokens, H hidden size, I intermediate size, E experts, K experts
per token, S = T * K routed rows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import r1kernels
from r1kernels.moe import grouped_gemm, moe_experts
from tests.support.gpu_streams import on_a_side_stream, without_waiting
from tests.support.moe_case import NAMES, Case, in_eager
from tests.support.moe_experts_kernel import DTYPES, SHAPES, MoeExpertsKernel
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.unchecked_offsets import assert_every_row_is_written

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_fallback():
    """A backend that refuses a call fails the test; it is not replaced."""
    before = r1kernels.backends.strict()
    r1kernels.backends.set_strict(True)
    yield
    r1kernels.backends.set_strict(before)


class TestMoeExpertsGpu(MoeExpertsKernel):
    device = "cuda"
    shapes = SHAPES
    wide = (1000, 320, 280, 6, 3)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "shape",
        [
            (4096, 512, 256, 8, 2),  # the tiles for many rows, several of each, in persistent programs
            (1000, 384, 320, 16, 1),  # those for some rows
            (3, 1024, 768, 64, 8),  # decode
            (700, 515, 259, 7, 3),  # rows that are no multiple of a vector
        ],
        ids=str,
    )
    def test_every_tile(self, backend, shape, dtype):
        self.check_exactness(Case(*shape, dtype=dtype), dtype=dtype)

    @pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
    def test_tensors_that_begin_between_vectors(self, backend, dtype):
        case = Case(300, 128, 64, 4, 2, dtype=dtype)
        expected = case.run(moe_experts)

        def moved(leaf):
            buffer = torch.empty(leaf.numel() + 1, dtype=leaf.dtype)
            return buffer[1:].view(leaf.shape).copy_(leaf.detach()).requires_grad_()

        case.hidden, case.gate_up, case.down = map(moved, (case.hidden, case.gate_up, case.down))
        for name, ours, plain in zip(NAMES, case.run(moe_experts), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2, msg=name)

    def test_offsets_that_nobody_checked(self, backend):
        assert_every_row_is_written(grouped_gemm)

    @pytest.mark.parametrize("save", ["hidden", "nothing"])
    def test_nothing_waits_for_the_gpu(self, backend, save):
        case = Case(500, 128, 64, 8, 2, dtype=torch.bfloat16)
        offsets = torch.tensor([0, 100, 100, 300, 310, 400, 410, 420, 490])

        def calls():
            case.run(lambda *arguments: moe_experts(*arguments, save=save))
            rows = grouped_gemm(case.hidden, case.gate_up, offsets)
            torch.autograd.grad(rows, (case.hidden, case.gate_up), torch.ones_like(rows))

        calls()
        with without_waiting():
            calls()

    def test_a_side_stream_is_respected(self, backend):
        case = Case(500, 128, 64, 8, 2, dtype=torch.bfloat16)
        _, *others = case.arguments()
        expected = moe_experts(case.hidden, *others)
        out = on_a_side_stream(case.hidden, lambda late: moe_experts(late, *others))
        assert same_bits(out.detach(), expected.detach())

    def test_a_graph_captures_and_replays_with_other_choices(self, backend):
        case = Case(256, 128, 64, 8, 2, dtype=torch.bfloat16)
        indices = case.indices.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Triton compiles before the capture
            case.run(moe_experts)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.run(moe_experts)
        for shift in (0, 3):  # the load of the experts is data: it may differ in a replay
            case.indices.copy_((indices + shift) % 8 if shift else torch.zeros_like(indices))
            graph.replay()
            for ours, expected in zip(captured, case.run(moe_experts), strict=True):
                assert same_bits(ours, expected)

    def test_compiled_by_inductor(self, backend):
        compiled = torch.compile(moe_experts, fullgraph=True)
        case = Case(200, 64, 48, 4, 2, dtype=torch.bfloat16)
        for ours, eager in zip(case.run(compiled), case.run(moe_experts), strict=True):
            torch.testing.assert_close(ours, eager)

    @pytest.mark.large
    @pytest.mark.parametrize("shape", [(8192, 2048, 768, 128, 8), (16384, 2048, 1024, 64, 8)], ids=str)
    def test_shapes_of_models(self, backend, shape):
        """Against eager in bfloat16 and float32 as the exact one; twice the same bits."""
        case = Case(*shape, dtype=torch.bfloat16)
        results, again = case.run(moe_experts), case.run(moe_experts)
        eager = case.run(in_eager)
        leaves = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
        out = in_eager(leaves[0], case.indices, *leaves[1:])
        exact = (out.detach(), *torch.autograd.grad(out, leaves, case.grad.float()))
        for ours, second, theirs, wide in zip(results, again, eager, exact, strict=True):
            assert same_bits(ours, second)
            assert_as_exact_as(ours, theirs, wide, torch.bfloat16)

    @pytest.mark.large
    def test_rows_past_2_to_the_31_elements(self, backend):
        """S H and S 2 I pass 2^31; the last tokens have the values that they have alone."""
        tokens, width, inner = 330_000, 2048, 1024
        hidden = torch.empty(tokens, width, dtype=torch.bfloat16).normal_(0, 0.1).requires_grad_()
        gate_up = torch.empty(4, 2 * inner, width, dtype=torch.bfloat16).normal_(0, width**-0.5)
        down = torch.empty(4, width, inner, dtype=torch.bfloat16).normal_(0, inner**-0.5)
        indices = torch.arange(4 * tokens).view(tokens, 4) % 4
        weights = torch.full((tokens, 4), 0.25)
        assert indices.numel() * width > 2**31 and indices.numel() * 2 * inner > 2**31
        out = moe_experts(hidden, indices, weights, gate_up, down)
        (grad,) = torch.autograd.grad(out, hidden, torch.ones_like(out))
        last = hidden.detach()[-64:].float().requires_grad_()
        few = torch.zeros_like(last)
        for expert in range(4):
            gate, up = F.linear(last, gate_up[expert].float()).chunk(2, -1)
            few = few + 0.25 * F.linear(F.silu(gate) * up, down[expert].float())
        (few_grad,) = torch.autograd.grad(few, last, torch.ones_like(few))
        torch.testing.assert_close(out[-64:].float(), few, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(grad[-64:].float(), few_grad, rtol=2e-2, atol=2e-2)
