"""Completions: which tokens belong to which, and sums over each.

Shapes: B completions, N tokens in all; padded, T = N / B tokens each, or packed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension, transforms
from ..op import Kernel, Size, recorded

# read once: torch.compile cannot trace a call into the extension
_CUDA_KERNELS = extension.cuda_missing() is None


class Completions(NamedTuple):
    """Sums or means over completions."""

    size: int | None = None  # B; None: every token for itself
    # (B + 1,) int64: completion i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]); None: padded
    cu_seqlens: Tensor | None = None
    divisor: Tensor | None = None  # (B,): the means' number of tokens, at least 1; None: sums

    def reduce(self, values: Tensor) -> Tensor:
        """The sum or mean of the token values (N,) of each completion, (B,); its tokens are added in a fixed order."""
        if self.size is None:
            return values
        if values.is_cuda and _CUDA_KERNELS:
            sums = SUMS("cuda", SumsCall(values, self.cu_seqlens, self.size))
        elif self.cu_seqlens is None:
            sums = values.view(self.size, values.shape[0] // max(self.size, 1)).sum(-1)
        else:
            sums = torch.segment_reduce(values, "sum", offsets=self.cu_seqlens, initial=0.0)
        return sums if self.divisor is None else sums / self.divisor

    def reduced(self, values: Tensor) -> Tensor:
        """``reduce`` with a gradient in the token values."""
        if self.size is None or transforms.active():
            return self.reduce(values)
        return _recorded(values.device.type, ReduceCall(values, self.size, self.cu_seqlens, self.divisor))

    def gradient(self, grad: Tensor | None) -> Tensor | None:
        """The gradient that every token of a completion gets, (B,), from that of the sum or mean."""
        return grad if grad is None or self.divisor is None else grad / self.divisor

    def of_tokens(self, grad: Tensor, tokens: int) -> Tensor:
        """The gradient of each token (N,) from that of the sum or mean, (B,); 0 where no completion holds it."""
        sequences = self.sequences(tokens, grad.device)
        if sequences is None:
            return grad
        grad = grad if self.divisor is None else grad / self.divisor
        return torch.where(sequences >= 0, grad[sequences.clamp(min=0)], 0.0)

    def sequences(self, tokens: int, device: torch.device) -> Tensor | None:
        """The completion of each token, (N,) int32; None: every token for itself."""
        if self.size is None:
            return None
        numbers = torch.arange(self.size, dtype=torch.int32, device=device)
        if self.cu_seqlens is None:
            return numbers.repeat_interleave(tokens // max(self.size, 1), output_size=tokens)
        if self.cu_seqlens.is_cuda and _CUDA_KERNELS:
            return NUMBERS("cuda", NumbersCall(self.cu_seqlens, tokens))
        return numbers.repeat_interleave(self.cu_seqlens.diff(), output_size=tokens)


EACH_TOKEN = Completions()


class SumsCall(NamedTuple):
    values: Tensor  # (N,) float32
    cu_seqlens: Tensor | None  # None: N / B tokens each
    completions: Size


class NumbersCall(NamedTuple):
    cu_seqlens: Tensor
    tokens: Size


def _sums_shape(call: SumsCall) -> Tensor:
    """(B,), added in a fixed order; NaN for bounds outside [0, N] or not in rising order."""
    return call.values.new_empty(call.completions)


def _numbers_shape(call: NumbersCall) -> Tensor:
    """The completion of each token (N,) int32, -1 where none holds it."""
    return call.cu_seqlens.new_empty(call.tokens, dtype=torch.int32)


SUMS = Kernel("completion_sums", SumsCall, _sums_shape, backends=("cuda",))
NUMBERS = Kernel("completion_numbers", NumbersCall, _numbers_shape, backends=("cuda",))


class ReduceCall(NamedTuple):
    values: Tensor  # (N,)
    size: Size
    cu_seqlens: Tensor | None
    divisor: Tensor | None


def _gradients(backend: str, inputs: Any, saved: Any, size: int, grads: Any, needs: Any) -> tuple[Tensor]:
    (values,), (cu_seqlens, divisor) = inputs, saved
    return (Completions(size, cu_seqlens, divisor).of_tokens(grads[0], values.shape[0]),)


_recorded = recorded(
    "grouped_logprobs",
    lambda _, call: Completions(*call[1:]).reduce(call.values),
    differentiable=lambda call: (call.values,),
    save=lambda call, _: ((call.cu_seqlens, call.divisor), call.size),
    backward=_gradients,
)
