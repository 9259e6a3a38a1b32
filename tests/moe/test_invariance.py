"""Gate, route and experts: a token has the same bits in any company, on the backends of the CPU."""

from __future__ import annotations

import pytest
import torch

from r1kernels import extension, moe_experts, router_logits
from tests.support.invariance_kernel import InvarianceKernel, Mixture
from tests.support.numerics import assert_as_exact_as, same_bits

EXTENSION = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
BACKENDS = ["reference", pytest.param("cpu", marks=EXTENSION)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@EXTENSION
class TestInvarianceCpu(InvarianceKernel):
    sizes = range(1, 301)

    @pytest.fixture
    def backend(self):
        return "cpu"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_threads_move_no_bit(self, backend, dtype):
        mixture = Mixture(backend, 300, 70, 33, 5, dtype)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                found.append(mixture.run(slice(None)))
            finally:
                torch.set_num_threads(1)
        for other in found[1:]:
            assert all(same_bits(mine, value) for mine, value in zip(other, found[0], strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_router_is_shared_out_by_columns(self, backend, dtype):
        hidden, weight = torch.randn(60, 70).to(dtype), torch.randn(200, 70).to(dtype)
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            try:
                found.append(router_logits(hidden, weight, backend=backend))
            finally:
                torch.set_num_threads(1)
        torch.testing.assert_close(found[0], hidden.float() @ weight.float().t())
        assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])

    @pytest.mark.parametrize("save", ["hidden", "nothing"])
    def test_the_backward_meets_the_activations_of_the_forward(self, backend, save):
        """With "nothing" they are computed again, by the kernel of the forward."""
        mixture = Mixture(backend, 20, 48, 32, 8, torch.float32)
        _, weights, indices, *_ = mixture.run(slice(None))
        grads = []
        for how in (save, "hidden"):
            leaves = [
                leaf.clone().requires_grad_()
                for leaf in (mixture.hidden, weights, mixture.gate_up, mixture.down)
            ]
            out = moe_experts(
                leaves[0], indices, *leaves[1:], save=how, batch_invariant=True, backend=backend
            )
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
        assert all(same_bits(one, other) for one, other in zip(*grads, strict=True))


class TestInvarianceReference(InvarianceKernel):
    @pytest.fixture
    def backend(self):
        return "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_is_float32_and_as_exact_as_eager(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 7, 90), (13, 90), (13,)
    leaves = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    grad = torch.randn(3, 7, 13, generator=generator)

    def results(function, inputs, upstream):
        logits = function(*inputs)
        return logits.detach(), *torch.autograd.grad(logits, inputs, upstream)

    def plain(x, w, b):
        return torch.nn.functional.linear(x.float(), w.float(), b.float())

    ours = results(lambda *x: router_logits(*x, backend=backend), leaves, grad)
    assert ours[0].dtype == torch.float32 and all(g.dtype == dtype for g in ours[1:])
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = results(torch.nn.functional.linear, double, grad.double())
    for mine, peer, exact in zip(ours, results(plain, leaves, grad), truth, strict=True):
        assert_as_exact_as(mine, peer, exact, mine.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gate_under_autocast_compiled_and_of_no_tokens(backend):
    x, w = torch.randn(6, 20), torch.randn(5, 20)
    expected = router_logits(x, w, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(router_logits(x, w, backend=backend), expected)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: router_logits(x, w, backend=backend), fullgraph=True, dynamic=True, backend=count
    )
    for tokens in (6, 2, 5):
        torch.testing.assert_close(compiled(x[:tokens].clone()), expected[:tokens])
    assert len(graphs) == 1
    for none in (x[:0], x.new_zeros(2, 0, 20)):
        assert router_logits(none, w, backend=backend).shape == (*none.shape[:-1], 5)
    assert router_logits(x[:0, :0], w[:, :0]).shape == (0, 5)


def test_float64_stays():
    x, w = torch.randn(4, 9, dtype=torch.float64), torch.randn(3, 9)
    torch.testing.assert_close(router_logits(x, w), x @ w.double().T)


def test_what_does_not_fit_is_a_clear_error():
    x = torch.randn(4, 9)
    with pytest.raises(ValueError, match=r"weight: expected shape \(any, 9\), got \(3, 8\)"):
        router_logits(x, torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"bias: expected shape \(3\), got \(4,\)"):
        router_logits(x, torch.randn(3, 9), torch.randn(4))
    with pytest.raises(TypeError, match="hidden: expected dtype"):
        router_logits(x.long(), torch.randn(3, 9))
    with pytest.raises(TypeError, match="batch_invariant: expected a bool, got int"):
        moe_experts(
            x, x[:, :1].long(), x[:, :1], torch.randn(2, 4, 9), torch.randn(2, 9, 2), batch_invariant=1
        )
