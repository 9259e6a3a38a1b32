"""Kept rows of the head, and gate, route and experts in any company, on the kernels of a GPU."""

from __future__ import annotations

import pytest
import torch

from r1kernels.logprob import kept_head
from tests.support.invariance_kernel import InvarianceKernel, Mixture
from tests.support.kept_products_kernel import KeptProductsKernel

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)


class Kernel:
    device = "cuda"

    def __init__(self, backend):
        self.backend = backend

    def products_into(self, call, raw):
        raw.copy_(kept_head.PRODUCTS(self.backend, call))

    def backward_into(self, call, *results):
        for result, found in zip(results, kept_head.PRODUCTS_BACKWARD(self.backend, call), strict=True):
            result.copy_(found)


class TestKeptProductsGpu(KeptProductsKernel):
    @pytest.fixture
    def kernel(self, backend):
        return Kernel(backend)


class MixtureOnGpu(Mixture):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        for name in ("hidden", "gate", "bias", "gate_up", "down"):
            setattr(self, name, getattr(self, name).cuda())


class TestInvarianceGpu(InvarianceKernel):
    tokens, dims = 3000, (256, 128, 8)
    sizes = (1, 2, 3, 7, 16, 17, 33, 64, 129, 300, 1025, 3000)

    def mixture(self, backend, dtype):
        return MixtureOnGpu(backend, self.tokens, *self.dims, dtype)
