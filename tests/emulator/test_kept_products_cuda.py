"""The CUDA kernels of kept rows of the head, their real source and launchers, under the host emulator."""

import pytest
import torch

from tests.support.emulated_rows import ELEMENTS, address
from tests.support.kept_products_kernel import Case, KeptProductsKernel
from tests.support.numerics import same_bits


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("token_logprobs")


class EmulatedKernel:
    device = "cpu"

    def __init__(self, module, seed=0):
        self.module, self.seed = module, seed

    def call(self, call):
        self.module.set_seed(self.seed)
        return self.module.KeptCall(
            address(call.hidden),
            address(call.weight),
            ELEMENTS.index(call.hidden.dtype),
            *call.hidden.shape,
            call.weight.shape[0],
            call.first,
            call.ids.shape[0],
            address(call.ids),
            address(call.tokens),
        )

    def products_into(self, call, raw):
        assert self.module.kept_products(self.call(call), address(call.bias), address(raw)) == 0

    def backward_into(self, call, for_hidden, for_weight, for_bias):
        needed = (call.need_hidden, call.need_weight, call.need_bias)
        for_hidden, for_weight, for_bias = (
            address(result) if need else 0
            for result, need in zip((for_hidden, for_weight, for_bias), needed, strict=True)
        )
        places = map(address, (call.offsets, call.order, call.grad))
        code = self.module.kept_backward(
            self.call(call), *places, for_hidden, call.slab, for_weight, for_bias
        )
        assert code == 0, self.module.error_text(code)


class TestKeptProductsCuda(KeptProductsKernel):
    @pytest.fixture
    def kernel(self, module):
        return EmulatedKernel(module)


def test_no_order_of_threads_or_blocks_moves_a_bit(module):
    case = Case(300, torch.bfloat16)
    first, *others = (case.run(EmulatedKernel(module, seed)) for seed in range(3))
    module.set_max_blocks(2)
    try:
        others.append(case.run(EmulatedKernel(module)))
    finally:
        module.set_max_blocks(2**32 - 1)
    for other in others:
        assert all(same_bits(mine, value) for mine, value in zip(other, first, strict=True))
