"""The cpu backend of the log-prob ops: csrc/logprob/cpu.cpp, in C++ with vector instructions, and torch's GEMM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import extension
from . import gemm, linear, linear_ops, ops, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    if tensor.device.type != "cpu":
        found.append(f"the {name} are on {tensor.device}, this backend is for the CPU")
    if tensor.dtype not in DTYPES:
        found.append(f"{str(tensor.dtype).removeprefix('torch.')} {name} are served by the reference alone")
    failure = extension.missing()
    if failure:
        found.append(failure)
    return tuple(found)


def _backward(logits: Tensor, *arguments: Any) -> Tensor:
    """The implementation of the op token_logprobs_cpu_backward."""
    grad = extension.empty(logits.shape, logits.dtype)
    ops.namespace.token_logprobs_cpu_backward_into(logits, *arguments, grad)
    return grad


ops.library.impl("token_logprobs_cpu_backward", _backward, "CPU")

ENGINE = tiles.Engine(
    backend="cpu",
    logits=gemm.logits,
    add_product=gemm.add_product,
    empty=lambda like, shape, dtype: extension.empty(shape, dtype),
    tile_bytes=8 << 20,
    tokens=1024,
    invariant_columns=2048,
    invariant_tokens=lambda dtype: 0 if gemm.is_ours(dtype) else 64,
)
linear_ops.implement(ENGINE, "CPU")
