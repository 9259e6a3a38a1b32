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

from .. import extension
from . import gpu, linear, linear_ops, ops, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # the capability of sm_80

_missing = extension.cuda_missing()  # read once: torch.compile can not trace a call into the extension


def reasons(logits: Tensor, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``autograd.run``)."""
    return _reasons("logits", logits)


def linear_reasons(hidden: Tensor, head: linear.Head, *arguments: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``linear.reference``)."""
    group = arguments[9]
    found = _reasons("hidden states", hidden)
    if group is not None:
        found += ("a vocabulary sharded over a process group is served by the reference alone",)
    return found


def _reasons(name: str, tensor: Tensor) -> tuple[str, ...]:
    found = []
    if tensor.device.type != "cuda":
        found.append(f"the {name} are on {tensor.device}, this backend is for NVIDIA GPUs")
    elif older_than_supported(tensor.device.index):
        found.append(f"{tensor.device} is older than sm_80")
    if tensor.dtype not in DTYPES:
        found.append(f"{str(tensor.dtype).removeprefix('torch.')} {name} are served by the reference alone")
    if _missing:
        found.append(_missing)
    return tuple(found)


def older_than_supported(device: int) -> bool:
    """Whether a CUDA device is too old for the kernels."""
    # torch.compile takes the properties, not the capability, for constants
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) < OLDEST


def _gradient(engine: tiles.Engine, tile: Tensor, rows: ops.Rows, dtype: torch.dtype, *saved: Any) -> Tensor:
    """The gradient of the raw logits of a tile, in the dtype that the GEMMs take."""
    if dtype == tile.dtype:
        return tiles.gradient_over_tile(engine, tile, rows, dtype, *saved)
    tokens, columns = tile.shape
    grad = tiles.scratch(engine, tile, tokens, columns, dtype)
    into = ops.namespace.token_logprobs_cuda_backward_into
    into(tile.unsqueeze(0), *rows, *saved, grad.unsqueeze(0))
    return grad


ENGINE = tiles.Engine(
    backend="cuda",
    logits=gpu.logits,
    add_product=gpu.add_product,
    empty=gpu.empty,
    tile_bytes=gpu.TILE_BYTES,
    tokens=gpu.TOKENS,
    invariant_columns=gpu.INVARIANT_COLUMNS,
    invariant_tokens=gpu.invariant_tokens,
    gradient=_gradient,
)


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
