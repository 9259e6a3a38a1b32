"""The Triton kernels of kept rows of the head in Triton's interpreter. Run by test_interpreter.py."""

import pytest
import torch

from r1kernels import linear_logprobs
from r1kernels.logprob import triton_kept
from tests.support import interpreter_bfloat16
from tests.support.kept_case import in_csr, sets_around
from tests.support.kept_products_kernel import KeptProductsKernel

interpreter_bfloat16.repair()


class InterpretedKernel:
    device = "cpu"
    products_into = staticmethod(triton_kept.products_into)
    backward_into = staticmethod(triton_kept.backward_into)


class TestKeptProductsTriton(KeptProductsKernel):
    @pytest.fixture
    def kernel(self):
        return InterpretedKernel

    @pytest.mark.parametrize(
        ("width", "dtype"), [(1, torch.float32), (37, torch.float16), (300, torch.bfloat16)]
    )
    def test_products_and_gradients(self, kernel, width, dtype):
        super().test_products_and_gradients(kernel, width, dtype)


def test_the_public_op_and_its_gradients():
    """A token that keeps everything among others; the whole call on Triton, its schemas kept."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=generator) for size in ((4, 9), (50, 9), (50,)))
    targets = torch.randint(0, 50, (4,), generator=generator)
    kept = in_csr(sets_around(targets, [3, 0, 20, 7], 50))
    results = []
    for name in ("triton", "reference"):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, w, b)]
        logp, entropy = linear_logprobs(
            *leaves[:2], targets, bias=leaves[2], kept=kept, return_entropy=True, softcap=5.0, backend=name
        )
        grads = torch.autograd.grad((logp - 2 * entropy).sum(), leaves)
        results.append((logp.detach(), entropy.detach(), *grads))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
