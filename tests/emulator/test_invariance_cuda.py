"""Gate, route and experts of the backend cuda under the host emulator: a token has the same bits in any company."""

import pytest
import torch

from tests.support.emulated_experts import EmulatedExperts
from tests.support.emulated_routing import EmulatedRouting
from tests.support.invariance_kernel import InvarianceKernel


class TestInvarianceCuda(InvarianceKernel):
    tokens, sizes, dims = 70, (1, 3, 17, 65), (40, 24, 3)

    @pytest.fixture
    def backend(self, emulated):
        """The ops of the backend cuda take CPU tensors, by the emulator, while a test runs."""
        library = torch.library.Library("r1kernels", "IMPL")
        EmulatedExperts(emulated("moe_experts")).register(library)
        EmulatedRouting(emulated("moe_routing")).register(library)
        yield "cuda"
        library._destroy()
