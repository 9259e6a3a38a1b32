"""The attentions that a part of a prefix tree can be computed with: torch's own fused ones, and plain PyTorch.

Each returns its log-sum-exp, and has a backward that takes the output and the log-sum-exp of all parts, merged.

B parts of one shape, H heads, D the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Options(NamedTuple):
    """The numbers of an attention layer."""

    scale: float
    softcap: float | None


class Operands(NamedTuple):
    """What a kernel attends with."""

    q: Tensor  # (B, H, T, D)
    k: Tensor  # k and v may have fewer heads
    v: Tensor
    causal: bool
    mask: Tensor | None  # (queries, keys), added to the scores
    options: Options


class Kernel(NamedTuple):
    """An attention and its gradient.

    ``forward(operands)`` gives (o, l), l (B, H, T); ``backward(operands, do, o, l)`` gives (dq, dk, dv).
    """

    name: str
    forward: Callable[[Operands], tuple[Tensor, Tensor]]
    backward: Callable[[Operands, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _flash_cpu(operands: Operands) -> tuple[Tensor, Tensor]:
    q, k, v, causal, mask, options = operands
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=options.scale
    )


def _flash_cpu_backward(
    operands: Operands, do: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, causal, mask, options = operands
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=options.scale
    )


def _flash_cuda(operands: Operands) -> tuple[Tensor, Tensor]:
    q, k, v, causal, _, options = operands
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=options.scale)
    return result[0], result[1]


def _flash_cuda_backward(
    operands: Operands, do: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, causal, _, options = operands
    no_dropout = torch.empty(0, dtype=torch.int64, device=q.device)
    lengths = (None, None, q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse.contiguous(), *lengths, 0.0, causal, no_dropout, no_dropout, scale=options.scale
    )


def _efficient_cuda(operands: Operands) -> tuple[Tensor, Tensor]:
    q, k, v, causal, mask, options = operands
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    result = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, _bias(mask, q), True, 0.0, causal, scale=options.scale
    )
    return result[0], result[1][..., : q.shape[2]]


def _efficient_cuda_backward(
    operands: Operands, do: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, causal, mask, options = operands
    key_heads = k.shape[1]
    k, v = (t.repeat_interleave(q.shape[1] // key_heads, dim=1) for t in (k, v))
    # the kernel reads whole blocks of 32 queries
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")).contiguous()
    no_dropout = torch.empty(0, dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        do,
        q,
        k,
        v,
        _bias(mask, q),
        o,
        lse,
        no_dropout,
        no_dropout,
        0.0,
        [True, True, True, False],
        causal,
        scale=options.scale,
    )
    return dq, dk.unflatten(1, (key_heads, -1)).sum(dim=2), dv.unflatten(1, (key_heads, -1)).sum(dim=2)


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask for every head, with rows that begin at multiples of 16 elements, as the kernel loads them."""
    if mask is None:
        return None
    padded = F.pad(mask, (0, -mask.shape[1] % 16))
    return padded[:, : mask.shape[1]].expand(*q.shape[:2], -1, -1)


def _eager(operands: Operands) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(operands)
    lse = scores.logsumexp(dim=-1)
    # a row that sees nothing: exp(-inf - 0) = 0
    p = (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()
    return (p @ operands.v.to(p.dtype).unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)


def _eager_backward(operands: Operands, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, *_ = operands
    scores, slope = _scores(operands)
    heads = scores.shape[1:3]
    do, o, lse, grouped = (t.to(scores.dtype).unflatten(1, heads) for t in (do, o, lse, q))
    p = (scores - lse.unsqueeze(-1)).exp()
    dv = (p.mT @ do).sum(dim=2)
    ds = p * (do @ v.to(p.dtype).unsqueeze(2).mT - (do * o).sum(dim=-1, keepdim=True)) * slope
    dq = ds @ k.to(p.dtype).unsqueeze(2)
    dk = (ds.mT @ grouped).sum(dim=2)
    return dq.flatten(1, 2), dk, dv


def _scores(operands: Operands) -> tuple[Tensor, Tensor | float]:
    """Scores (B, key heads, queries per key head, queries, keys), and their slope in q k^T; float32 at least."""
    q, k, _, causal, mask, options = operands
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype).unflatten(1, (k.shape[1], -1))
    scores = q @ k.to(dtype).unsqueeze(2).mT * options.scale
    slope: Tensor | float = options.scale
    if options.softcap is not None:
        # c tanh(s / c) has the slope 1 - tanh(s / c)^2
        bounded = (scores / options.softcap).tanh()
        scores, slope = options.softcap * bounded, options.scale * (1 - bounded.square())
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    return (scores if mask is None else scores + mask.to(dtype)), slope


FLASH_CPU = Kernel("torch's flash attention for CPUs", _flash_cpu, _flash_cpu_backward)
FLASH_CUDA = Kernel("torch's flash attention", _flash_cuda, _flash_cuda_backward)
EFFICIENT_CUDA = Kernel("torch's memory-efficient attention", _efficient_cuda, _efficient_cuda_backward)
EAGER = Kernel("plain PyTorch", _eager, _eager_backward)


def choose(q: Tensor, v: Tensor, masked: bool, options: Options) -> Kernel:
    """The kernel for parts of an attention layer; all but EAGER take values of the size of the keys."""
    size = q.shape[-1]
    if options.softcap is not None or v.shape[-1] > size:
        return EAGER
    if q.device.type == "cpu":
        return FLASH_CPU
    if q.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(q.device) < (8, 0):
        return EAGER
    half = q.dtype in (torch.bfloat16, torch.float16)
    if half and size % 8 == 0 and size <= 256 and not masked:
        return FLASH_CUDA
    if (half and size % 8 == 0) or (q.dtype == torch.float32 and size % 4 == 0):
        return EFFICIENT_CUDA
    return EAGER
