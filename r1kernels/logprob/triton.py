"""The Triton backend of token_logprobs: which calls it serves, and its ops.

Triton is imported at the first launch, never before. With TRITON_INTERPRET=1, Triton's own switch, kernels run in its
interpreter, which serves tensors on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cuda import DTYPES, older_than_supported

MAX_ROWS = 2**31 - 1  # programs in the first dimension of a grid
VECTOR_BYTES = 16

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def reasons(logits: Tensor, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``autograd.run``)."""
    found = []
    if logits.device.type == "cuda":
        if older_than_supported(logits.device.index):
            found.append(f"{logits.device} is older than sm_80")
    elif not _INTERPRETED:
        found.append(f"the logits are on {logits.device}, Triton needs a GPU")
    if not _INSTALLED:
        found.append("the package triton is not installed")
    if logits.dtype not in DTYPES:
        found.append(f"{str(logits.dtype).removeprefix('torch.')} logits are served by the reference alone")
    if logits.shape[0] * logits.shape[1] > MAX_ROWS:
        found.append(f"{logits.shape[0] * logits.shape[1]} rows, a grid holds at most {MAX_ROWS}")
    return tuple(found)


def forward(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob (N,), entropy (N,) or empty, and the sums M, S', E' of each row as (3, N)."""
    rows = logits.shape[0] * logits.shape[1]
    logp = logits.new_empty(rows, dtype=torch.float32)
    value = logits.new_empty(rows if entropy else 0, dtype=torch.float32)
    stats = logits.new_empty((3, rows), dtype=torch.float32)
    forward_into(
        logits, targets, temperatures, temperature, ignore_index, logp, value if entropy else None, stats
    )
    return logp, value, stats


def backward(logits: Tensor, *arguments: Any) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype; the arguments are those of the op's schema."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    backward_into(grad, logits, *arguments)
    return grad


def backward_(logits: Tensor, *arguments: Any) -> None:
    """The gradient of the logits, written over them."""
    backward_into(logits, logits, *arguments)


def forward_into(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor | None,
    stats: Tensor,
) -> None:
    """``forward`` into tensors that the caller gives; no entropy is computed where it is None."""
    if logp.numel() == 0:
        return
    # the order of a sum follows the width of the loads: it may depend on V alone, or a row's bits would change with
    # the place of the tensor in memory
    unit = VECTOR_BYTES // logits.element_size()
    if logits.shape[2] % unit:
        unit = 1
    if not _rows_are_multiples_of(unit, logits):
        logits = logits.clone(memory_format=torch.contiguous_format)
    from . import triton_kernels as kernels

    with torch.cuda.device_of(logits):
        kernels.forward_kernel[(logp.numel(),)](
            logits,
            targets,
            temperatures,
            temperature,
            logp,
            entropy,
            stats,
            ignore_index,
            logp.numel(),
            logits.shape[1],
            logits.shape[2] // unit,
            *_strides(logits, unit),
            UNIT=unit,
            BLOCK=kernels.BLOCK,
            num_warps=kernels.WARPS,
            enable_fp_fusion=True,
        )


def backward_into(
    grad_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    logp: Tensor,
    stats: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """``backward`` into ``grad_logits``, which may be ``logits``."""
    if logp.numel() == 0:
        return
    unit = VECTOR_BYTES // logits.element_size()
    if logits.shape[2] % unit or not _rows_are_multiples_of(unit, logits, grad_logits):
        unit = 1
    from . import triton_kernels as kernels

    with torch.cuda.device_of(logits):
        kernels.backward_kernel[(logp.numel(),)](
            grad_logits,
            logits,
            targets,
            temperatures,
            temperature,
            logp,
            stats,
            grad_logp,
            grad_entropy,
            ignore_index,
            logp.numel(),
            logits.shape[1],
            logits.shape[2] // unit,
            *_strides(logits, unit),
            *_strides(grad_logits, unit),
            UNIT=unit,
            BLOCK=kernels.BLOCK,
            num_warps=kernels.WARPS,
            enable_fp_fusion=True,
        )


def _strides(tensor: Tensor, unit: int) -> tuple[int, int]:
    """The strides of B and T in units; that of a dimension of size 1 is never used."""
    batch, token = (0 if tensor.shape[i] == 1 else tensor.stride(i) // unit for i in (0, 1))
    return batch, token


def _rows_are_multiples_of(unit: int, *tensors: Tensor) -> bool:
    """Whether every row of (B, T, V) tensors begins on a boundary of ``unit`` elements."""
    return unit == 1 or all(
        tensor.data_ptr() % VECTOR_BYTES == 0 and all(stride % unit == 0 for stride in _strides(tensor, 1))
        for tensor in tensors
    )


for _key in ("CUDA", "CPU"):  # on the CPU, in Triton's interpreter
    ops.library.impl("token_logprobs_triton", forward, _key)
    ops.library.impl("token_logprobs_triton_backward", backward, _key)
    ops.library.impl("token_logprobs_triton_backward_", backward_, _key)
