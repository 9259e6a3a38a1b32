"""moe_experts and grouped_gemm on the backends for CPUs, and beside the experts of transformers.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels.moe import moe_experts
from tests.support.moe_case import Case
from tests.support.moe_experts_kernel import DTYPES, MoeExpertsKernel
from tests.support.numerics import assert_as_exact_as, same_bits


class TestMoeExperts(MoeExpertsKernel):
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows", [15, 17, 40, 65])
    def test_steps_that_are_not_whole(self, backend, rows, dtype):
        self.check_exactness(Case(rows, 520, 41, 2, 2, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # the reference's products are torch's
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 200])
def test_runs_agree_bit_for_bit_on_any_number_of_threads(backend, dtype, tokens):
    case = Case(tokens, 160, 140, 6, 3, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(moe_experts))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(first, second) for first, second in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # it alone writes large gradients in another way
@pytest.mark.parametrize("hidden", [512, 509])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_larger_than_caches(backend, dtype, hidden):
    """The gradient of an expert has the same bits among many experts as among few, whose gradients caches hold."""
    many, few = 144 // dtype.itemsize, 3
    case = Case(20, hidden, 256, few, 2, dtype=dtype, indices=torch.arange(40).view(20, 2) % few)
    among_few = case.run(moe_experts)[3:]
    case.gate_up, case.down = (
        torch.cat((weight.detach(), weight.new_zeros(many - few, *weight.shape[1:]))).requires_grad_()
        for weight in (case.gate_up, case.down)
    )
    *_, gate_up, down = case.run(moe_experts)
    assert all(grad.nbytes > 16 << 20 for grad in (gate_up, down))
    for ours, expected in zip((gate_up, down), among_few, strict=True):
        assert same_bits(ours[:few], expected) and (ours[few:] == 0).all()


def unaligned(weight):
    """A copy of ``weight`` at an odd address, as in a memory-mapped file."""
    file = torch.empty(weight.numel() * weight.element_size() + 1, dtype=torch.uint8)
    file[1:] = weight.detach().flatten().view(torch.uint8)
    moved = torch.frombuffer(file.numpy(), dtype=weight.dtype, offset=1).view(weight.shape)
    assert moved.data_ptr() % weight.element_size() or weight.numel() == 0
    return moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_weights(backend, dtype):
    case = Case(60, 37, 15, 4, 2, dtype=dtype)
    expected = case.run(moe_experts)
    case.gate_up, case.down = (unaligned(weight).requires_grad_() for weight in (case.gate_up, case.down))
    for ours, plain in zip(case.run(moe_experts), expected, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer", ["eager", "grouped_mm"])
def test_against_the_experts_of_transformers(backend, peer, dtype):
    # not above: importing them takes half as long as all that the other instruction sets run of this file
    from transformers.integrations import moe as transformers_moe
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    case = Case(64, 48, 40, 8, 2, dtype=dtype)
    config = Qwen3MoeConfig(
        hidden_size=48, moe_intermediate_size=40, num_experts=8, num_experts_per_tok=2, hidden_act="silu"
    )
    config._experts_implementation = peer
    module = Qwen3MoeExperts(config).to(dtype)
    module.gate_up_proj, module.down_proj = (
        torch.nn.Parameter(case.gate_up.detach()),
        torch.nn.Parameter(case.down.detach()),
    )

    def theirs(hidden, indices, weights, gate_up, down):
        return torch.func.functional_call(
            module, {"gate_up_proj": gate_up, "down_proj": down}, (hidden, indices, weights.to(dtype))
        )

    assert peer == "eager" or peer in transformers_moe.ALL_EXPERTS_FUNCTIONS
    for ours, peers, exact in zip(case.run(moe_experts), case.run(theirs), case.exact(), strict=True):
        assert_as_exact_as(ours, peers, exact, dtype)
