"""The C++ kernels of kept rows of the head."""

from __future__ import annotations

import pytest

from r1kernels import extension
from r1kernels.logprob import kept_head
from tests.support.kept_products_kernel import KeptProductsKernel

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


class Kernel:
    device = "cpu"

    @staticmethod
    def products_into(call, raw):
        raw.copy_(kept_head.PRODUCTS("cpu", call))

    @staticmethod
    def backward_into(call, *results):
        for result, found in zip(results, kept_head.PRODUCTS_BACKWARD("cpu", call), strict=True):
            assert result.shape == found.shape and result.dtype == found.dtype
            result.copy_(found)


class TestKeptProductsCpu(KeptProductsKernel):
    @pytest.fixture
    def kernel(self):
        return Kernel
