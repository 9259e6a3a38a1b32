"""The cpu backend of the log-prob ops: csrc/logprob/cpu.cpp, in C++ with vector instructions, and torch's GEMM."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import devices, extension
from . import gemm, linear, linear_ops, ops, tiles


def reasons(logits: Tensor, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``autograd.run``)."""
    return tuple(devices.cpu("logits", logits))


def linear_reasons(hidden: Tensor, head: linear.Head, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``linear.reference``)."""
    return tuple(devices.cpu("hidden", hidden))


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
