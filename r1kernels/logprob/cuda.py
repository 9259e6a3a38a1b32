"""The cuda backend of the log-prob ops: csrc/logprob/cuda_*.cuh, in C++ for NVIDIA GPUs, and torch's GEMM.

Ops of its own, beside those of ops.py and linear_ops.py:

    token_logprobs_cuda_backward_into(logits, *rows, ..., sequences, grad) -> ()
        the gradient into ``grad``: of the shape of the logits, any strides on B and T, and of float32 logits any dtype
    completion_sums_cuda(values, cu_seqlens, completions) -> sums
        values (N,) float32, cu_seqlens (B + 1,) int64 or None (N / B tokens each); sums (B,), in a fixed order, NaN for
        bounds outside [0, N] or not in rising order
    completion_numbers_cuda(cu_seqlens, tokens) -> numbers
        the completion of each token (N,) int32, -1 where none holds it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import devices
from . import gpu, linear, linear_ops, ops, tiles


def reasons(logits: Tensor, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``autograd.run``)."""
    return tuple(devices.cuda("logits", logits))


def linear_reasons(hidden: Tensor, head: linear.Head, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``linear.reference``)."""
    return tuple(devices.cuda("hidden", hidden))


def _gradient(engine: tiles.Engine, tile: Tensor, rows: ops.Rows, dtype: torch.dtype, *saved: Any) -> Tensor:
    """The gradient of the raw logits of a tile, in the dtype that the GEMMs take."""
    if dtype == tile.dtype:
        return tiles.gradient_over_tile(engine, tile, rows, dtype, *saved)
    tokens, columns = tile.shape
    grad = tiles.scratch(engine, tile, tokens, columns, dtype)
    into = ops.namespace.token_logprobs_cuda_backward_into
    into(tile.unsqueeze(0), *rows, *saved, grad.unsqueeze(0))
    return grad


ENGINE = gpu.engine("cuda", _gradient)


def _fake_into(logits: Tensor, *unused: object) -> None:
    return None


def _fake_sums(values: Tensor, cu_seqlens: Tensor | None, completions: int) -> Tensor:
    return values.new_empty(completions)


def _fake_numbers(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return cu_seqlens.new_empty(tokens, dtype=torch.int32)


for _schema, _fake in (
    (
        f"token_logprobs_cuda_backward_into(Tensor logits, {ops.ROWS}, {ops.GRADS}, Tensor(a!) grad) -> ()",
        _fake_into,
    ),
    ("completion_sums_cuda(Tensor values, Tensor? cu_seqlens, SymInt completions) -> Tensor", _fake_sums),
    ("completion_numbers_cuda(Tensor cu_seqlens, SymInt tokens) -> Tensor", _fake_numbers),
):
    ops.library.define(_schema)
    torch.library.register_fake(f"r1kernels::{_schema.split('(')[0]}", _fake, lib=ops.library)
linear_ops.implement(ENGINE, "CUDA")
