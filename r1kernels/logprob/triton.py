"""The Triton backend of the log-probs on rows of logits: which calls it serves, and its ops.

Triton is imported at the first launch, never before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import devices
from . import ops

MAX_PROGRAMS = 2**31 - 1  # in the first dimension of a grid
VECTOR_BYTES = 16
SEGMENT = 1 << 15  # logits that a program reads; few rows of a large vocabulary still fill a GPU


def reasons(logits: Tensor, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``autograd.run`` or ``grouped.run``)."""
    found = devices.triton("logits", logits)
    columns = logits.shape[-1]
    rows = logits.numel() // columns
    if rows * _segments(columns) > MAX_PROGRAMS:
        found.append(f"{rows} rows of {columns} logits, a grid holds at most {MAX_PROGRAMS} programs")
    return tuple(found)


def forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The implementation of the op ``token_logprobs_triton``."""
    *described, entropy, extra = arguments
    rows = ops.Rows(*described)
    results = empty_results(logits, logits.shape[0] * logits.shape[1], rows, logits.shape[2], entropy, extra)
    forward_into(logits, rows, entropy, *results)
    return results


def backward(logits: Tensor, *arguments: Any) -> Tensor:
    """The implementation of the op ``token_logprobs_triton_backward``."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    backward_into(grad, logits, *_described(arguments))
    return grad


def backward_(logits: Tensor, *arguments: Any) -> None:
    """The implementation of the op ``token_logprobs_triton_backward_``."""
    backward_into(logits, logits, *_described(arguments))


def empty_results(
    like: Tensor, count: int, rows: ops.Rows, columns: int, entropy: bool, extra: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors for (logp, entropy, stats, extra) of ``count`` rows with these columns of the vocabulary."""
    empty = like.new_empty
    return (
        empty(count, dtype=torch.float32),
        empty(count if entropy and columns == rows.vocabulary else 0, dtype=torch.float32),
        empty((3, count), dtype=torch.float32),
        empty((3 if extra else 0, count), dtype=torch.float32),
    )


def forward_into(
    logits: Tensor, rows: ops.Rows, entropy: bool, logp: Tensor, value: Tensor, stats: Tensor, extra: Tensor
) -> None:
    """``forward`` into tensors that the caller gives, shaped as ``empty_results`` gives them."""
    count, columns = logp.numel(), logits.shape[2]
    if count == 0:
        return
    # the order of a sum follows the width of the loads: it may depend on V alone, or a row's bits would change with
    # the place of the tensor in memory
    unit = VECTOR_BYTES // logits.element_size()
    if columns % unit:
        unit = 1
    if not _rows_are_multiples_of(unit, logits):
        logits = logits.clone(memory_format=torch.contiguous_format)
    from . import triton_kernels as kernels

    segments = _segments(columns)
    parts = None if segments == 1 else empty_parts(logits, count, segments, extra)
    with torch.cuda.device_of(logits):
        kernels.forward_kernel[(count * segments,)](
            logits,
            *head_arguments(rows),
            *row_arguments(rows),
            logp,
            _or_none(value),
            stats,
            _or_none(extra),
            parts,
            rows.ignore_index,
            count,
            logits.shape[1],
            *_strides(logits, unit),
            columns // unit,
            SEGMENT // unit,
            segments,
            rows.first,
            UNIT=unit,
            LANES=kernels.LANES,
            GROUP=unit if unit > 1 else kernels.GROUP,
            SLAB=columns != rows.vocabulary,
            ENTROPY=entropy,
            EXTRA=extra.numel() > 0,
            num_warps=kernels.WARPS,
            enable_fp_fusion=True,
        )
    if parts is not None:
        finish_into(parts, columns, rows, entropy, logp, value, stats, extra)


def empty_parts(like: Tensor, count: int, parts: int, extra: Tensor) -> Tensor:
    """A tensor for the sums over each of so many parts of ``count`` rows."""
    return like.new_empty((6 if extra.numel() else 3, parts, count), dtype=torch.float32)


def finish_into(
    parts: Tensor,
    columns: int,
    rows: ops.Rows,
    entropy: bool,
    logp: Tensor,
    value: Tensor,
    stats: Tensor,
    extra: Tensor,
) -> None:
    """Merge the parts of each row, and turn the logit of the target, which lies in ``logp``, into results."""
    from . import triton_kernels as kernels

    with torch.cuda.device_of(parts):
        kernels.finish_kernel[(-(-logp.numel() // kernels.FINISH_ROWS),)](
            parts,
            *row_arguments(rows),
            logp,
            _or_none(value),
            stats,
            _or_none(extra),
            rows.ignore_index,
            logp.numel(),
            parts.shape[1],
            columns,
            rows.first,
            ROWS=kernels.FINISH_ROWS,
            PARTS=kernels.FINISH_PARTS,
            SLAB=columns != rows.vocabulary,
            ENTROPY=entropy,
            EXTRA=extra.numel() > 0,
            num_warps=kernels.FINISH_WARPS,
            enable_fp_fusion=True,
        )


def backward_into(
    grad_logits: Tensor,
    logits: Tensor,
    rows: ops.Rows,
    logp: Tensor,
    stats: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    sequences: Tensor | None,
) -> None:
    """``backward`` into ``grad_logits``, which may be ``logits``."""
    count, columns = logp.numel(), logits.shape[2]
    if count == 0:
        return
    unit = VECTOR_BYTES // logits.element_size()
    if columns % unit or not _rows_are_multiples_of(unit, logits, grad_logits):
        unit = 1
    from . import triton_kernels as kernels

    segments = _segments(columns)
    with torch.cuda.device_of(logits):
        kernels.backward_kernel[(count * segments,)](
            grad_logits,
            logits,
            *head_arguments(rows),
            *row_arguments(rows),
            logp,
            stats,
            grad_logp,
            grad_entropy,
            sequences,
            rows.ignore_index,
            count,
            logits.shape[1],
            *_strides(logits, unit),
            *_strides(grad_logits, unit),
            columns // unit,
            SEGMENT // unit,
            segments,
            rows.first,
            rows.vocabulary,
            UNIT=unit,
            BLOCK=kernels.BLOCK,
            num_warps=kernels.WARPS,
            enable_fp_fusion=True,
        )


def head_arguments(rows: ops.Rows) -> tuple[Tensor | None, float | None, float | None]:
    """bias, logit_scale and softcap for a kernel, None for a step that changes nothing."""
    scale = None if rows.logit_scale == 1.0 else float(rows.logit_scale)
    return rows.bias, scale, None if rows.softcap == 0.0 else float(rows.softcap)


def row_arguments(rows: ops.Rows) -> tuple[Tensor, Tensor | None, float]:
    """targets, temperatures and temperature for a kernel."""
    return rows.targets, rows.temperatures, float(rows.temperature)


def _described(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a backward op with those that describe its rows as one."""
    fields = len(ops.Rows._fields)
    return ops.Rows(*arguments[:fields]), *arguments[fields:]


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _segments(columns: int) -> int:
    """The programs that share a row: they depend on V alone, so that a row's bits depend on nothing else."""
    return -(-columns // SEGMENT)


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
