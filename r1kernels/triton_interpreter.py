"""What Triton's interpreter (TRITON_INTERPRET=1) gets wrong. Imports Triton: import this module only where it is used."""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(out, SIZE: tl.constexpr):
    """out (SIZE, SIZE) float32: the product of two bfloat16 matrices of 1.5."""
    factor = tl.full((SIZE, SIZE), 1.5, tl.bfloat16)
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(factor, factor))


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether a product of bfloat16 matrices is one: the interpreter of Triton 3.9 multiplies their raw bits."""
    size = 16
    out = torch.empty(size, size)
    product_kernel[(1,)](out, SIZE=size)
    return bool((out == 1.5 * 1.5 * size).all())
