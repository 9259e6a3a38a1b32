"""Gate, route and experts on Triton: a token has the same bits in any company. Run by test_interpreter.py."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from r1kernels.moe import tuning
from tests.support import interpreter_bfloat16
from tests.support.invariance_kernel import InvarianceKernel

interpreter_bfloat16.repair()


def in_order(self, a, b, d, *options):
    """NumPy's product rounds by where a row stands in the matrix, which a tensor core does not: here k goes in order."""
    left, right = (
        interpreter_bfloat16.widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b)
    )
    product = (left[:, :, None] * right[None, :, :]).sum(axis=1, dtype=left.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


FEW = tuning.Tile(16, 32, 16, group=2, warps=4, stages=2, descriptors=False)
MANY = tuning.Tile(32, 32, 32, group=2, warps=4, stages=2, descriptors=False)


class TestInvarianceTriton(InvarianceKernel):
    """All tokens are MANY; three of them, and one, are FEW. In float32, for bfloat16 rounds away what another order of a sum gives."""

    tokens, sizes, dims = 20, (3,), (40, 16, 3)

    @pytest.mark.parametrize("dtype", [torch.float32], ids=str)
    def test_a_token_has_the_same_bits_in_any_company(self, backend, dtype):
        super().test_a_token_has_the_same_bits_in_any_company(backend, dtype)

    @pytest.fixture
    def backend(self, monkeypatch):
        """A table whose entries differ, as those of GPUs do."""
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_order)

        def tile(kernel, device, dtype, rows, experts):
            return FEW if rows <= 8 * experts else MANY

        monkeypatch.setattr(tuning, "tile", tile)
        return "triton"
