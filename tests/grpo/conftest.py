"""Random GRPO batches: padded, with sequences of unequal length and one without any counted token, and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Batch(NamedTuple):
    """B sequences of at most T tokens; ``logp`` requires a gradient."""

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    sampler_logp: Tensor
    entropy: Tensor
    advantages: Tensor
    mask: Tensor

    def packed(self, values: Tensor) -> Tensor:
        """Padded (B, T) values as (N,): every sequence cut behind its last counted token."""
        lengths = self.lengths().tolist()
        return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])

    def cu_seqlens(self) -> Tensor:
        return torch.nn.functional.pad(self.lengths().cumsum(0), (1, 0)).to(torch.int32)

    def lengths(self) -> Tensor:
        positions = torch.arange(1, self.mask.shape[1] + 1)
        return torch.where(self.mask, positions, 0).amax(1) if self.mask.shape[1] else self.mask.sum(1)


def make_batch(
    seed: int = 0,
    num_sequences: int = 5,
    num_tokens: int = 9,
    dtype: torch.dtype = torch.float64,
    drift: float = 0.4,
    empty: bool = True,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (num_sequences, num_tokens)
    old = -noise(*shape).abs() * 2 - 0.1
    mask = torch.rand(*shape, generator=generator) > 0.3
    if num_tokens:
        mask[:, 0] = True
    if empty and num_sequences > 2:
        mask[2] = False
    advantages = noise(num_sequences)
    if num_sequences > 4:  # on both sides of 0, and close to it
        advantages[3:5] = torch.tensor([-0.05, 0.05], dtype=dtype)
    return Batch(
        logp=(old + drift * noise(*shape)).requires_grad_(),
        old_logp=old,
        ref_logp=old + drift * noise(*shape),
        sampler_logp=old + drift * noise(*shape),
        entropy=noise(*shape).abs().requires_grad_(),
        advantages=advantages,
        mask=mask,
    )


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Batch]:
    return make_batch
