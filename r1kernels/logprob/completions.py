"""Completions: which tokens belong to which, and sums over each.

Shapes: B completions, N tokens in all; padded, T = N / B tokens each, or packed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import extension
from . import ops

_CUDA_KERNELS = (
    extension.cuda_missing() is None
)  # read once: torch.compile can not trace a call into the extension


class Completions(NamedTuple):
    """Sums or means over completions, as arguments of an autograd function: tensors or None, and numbers."""

    size: int  # B
    cu_seqlens: (
        Tensor | None
    )  # (B + 1,) int64: completion i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]); None: padded
    divisor: Tensor | None  # (B,): the means' number of tokens, at least 1; None: sums

    def reduce(self, values: Tensor) -> Tensor:
        """The sum or mean of the token values (N,) of each completion, (B,); its tokens are added in a fixed order."""
        if values.is_cuda and _CUDA_KERNELS:
            sums = ops.namespace.completion_sums_cuda(values, self.cu_seqlens, self.size)
        elif self.cu_seqlens is None:
            sums = values.view(self.size, values.shape[0] // max(self.size, 1)).sum(-1)
        else:
            sums = torch.segment_reduce(values, "sum", offsets=self.cu_seqlens, initial=0.0)
        return sums if self.divisor is None else sums / self.divisor

    def gradient(self, grad: Tensor | None) -> Tensor | None:
        """The gradient that every token of a completion gets, (B,), from that of the sum or mean."""
        if grad is None or self.divisor is None:
            return None if grad is None else grad.contiguous()
        return grad / self.divisor

    def of_tokens(self, grad: Tensor, tokens: int) -> Tensor:
        """The gradient of each token (N,) from that of the sum or mean, (B,); 0 where no completion holds it."""
        sequences = self.sequences(tokens, grad.device)
        grad = grad if self.divisor is None else grad / self.divisor
        return torch.where(sequences >= 0, grad[sequences.clamp(min=0)], 0.0)

    def sequences(self, tokens: int, device: torch.device) -> Tensor:
        """The completion of each token, (N,) int32."""
        numbers = torch.arange(self.size, dtype=torch.int32, device=device)
        if self.cu_seqlens is None:
            return numbers.repeat_interleave(tokens // max(self.size, 1), output_size=tokens)
        if self.cu_seqlens.is_cuda and _CUDA_KERNELS:
            return ops.namespace.completion_numbers_cuda(self.cu_seqlens, tokens)
        return numbers.repeat_interleave(self.cu_seqlens.diff(), output_size=tokens)
