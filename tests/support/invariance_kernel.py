"""What a backend must do so that a token of a mixture has the same bits in any company: gate, route, experts.

A test class inherits from ``InvarianceKernel`` and has a fixture ``backend``, a backend whose ops take CPU tensors there (by
themselves, under an emulator or an interpreter). T tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1kernels import moe_experts, route, router_logits
from tests.support.forced import public_on
from tests.support.numerics import same_bits

RANK = 4  # of the low-rank additions to the experts


class Mixture:
    """Everything that a token goes through; ``run(tokens)`` of some tokens, in the order given."""

    def __init__(self, backend: str, tokens: int, size: int, width: int, experts: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        self.backend = backend
        self.hidden = normal(tokens, size) * size**0.5
        self.gate, self.bias = normal(experts, size), normal(experts)
        self.gate_up, self.down = normal(experts, 2 * width, size), normal(experts, size, width)
        up, down = (
            (normal(experts, RANK, inputs), normal(experts, outputs, RANK))
            for inputs, outputs in ((size, 2 * width), (width, size))
        )
        self.lora = (*up, *down, 2.0)

    def run(self, tokens: Tensor | slice) -> tuple[Tensor, ...]:
        """(logits, weights, indices, the output of the experts, and that with low-rank additions)"""
        hidden = self.hidden[tokens]
        logits = public_on(self.backend, router_logits, hidden, self.gate, self.bias)
        logits = logits + self.bias.float()  # the seam hands over what the op gives, without the bias
        weights, indices, _ = public_on(self.backend, route, logits, 2, score="softmax")
        call = (hidden, indices, weights, self.gate_up, self.down)
        outputs = (
            public_on(self.backend, moe_experts, *call, lora=lora, batch_invariant=True)
            for lora in (None, self.lora)
        )
        return logits, weights, indices, *outputs


class InvarianceKernel:
    tokens = 300
    sizes = (
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        12,
        16,
        23,
        24,
        25,
        31,
        33,
        63,
        64,
        65,
        100,
        127,
        129,
        200,
        255,
        257,
        299,
        300,
    )
    dims = (48, 32, 8)  # H, I, E: with all tokens an expert has more rows than any kernel switches at

    def mixture(self, backend: str, dtype: torch.dtype) -> Mixture:
        return Mixture(backend, self.tokens, *self.dims, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_token_has_the_same_bits_in_any_company(self, backend, dtype):
        mixture = self.mixture(backend, dtype)
        everything = mixture.run(slice(None))
        for size in self.sizes:
            for mine, whole in zip(mixture.run(slice(0, size)), everything, strict=True):
                assert same_bits(mine, whole[:size]), size
        order = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(1))
        for mine, whole in zip(mixture.run(order), everything, strict=True):
            assert same_bits(mine, whole[order])
        for token in (0, 7, self.tokens - 1):  # decode
            for mine, whole in zip(mixture.run(slice(token, token + 1)), everything, strict=True):
                assert same_bits(mine, whole[token : token + 1])
