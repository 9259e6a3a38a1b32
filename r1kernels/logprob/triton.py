"""The Triton backend of the log-probs on rows of logits: its ops.

Triton is imported at the first launch, never before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import token
from .token import Rows, Upstream, segments

VECTOR_BYTES = 16


@token.FORWARD.implement("triton")
def forward(call: token.RowsCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, rows, with_entropy, with_extra = call
    batch, tokens, columns = logits.shape
    results = token.row_results(logits, batch * tokens, columns, rows, with_entropy, with_extra)
    forward_into(logits, rows, with_entropy, *results)
    return results


@token.BACKWARD.implement("triton")
def backward(call: token.RowsBackwardCall) -> Tensor:
    grad = torch.empty_like(call.logits, memory_format=torch.contiguous_format)
    backward_into(grad, call.logits, call.rows, call.upstream)
    return grad


@token.BACKWARD_OVER.implement("triton")
def backward_over(call: token.RowsBackwardOverCall) -> None:
    backward_into(call.logits, call.logits, call.rows, call.upstream)


def forward_into(
    logits: Tensor,
    rows: Rows,
    with_entropy: bool,
    logp: Tensor,
    entropy: Tensor,
    stats: Tensor,
    extra: Tensor,
) -> None:
    """``forward`` into tensors that the caller gives, shaped as ``row_results`` gives them."""
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

    pieces = segments(columns)
    parts = None if pieces == 1 else empty_parts(logits, count, pieces, extra)
    with torch.cuda.device_of(logits):
        kernels.forward_kernel[(count * pieces,)](
            logits,
            *head_arguments(rows),
            *row_arguments(rows),
            logp,
            _or_none(entropy),
            stats,
            _or_none(extra),
            parts,
            rows.ignore_index,
            count,
            logits.shape[1],
            *strides_of(logits, unit),
            columns // unit,
            token.SEGMENT // unit,
            pieces,
            rows.first,
            UNIT=unit,
            LANES=kernels.LANES,
            GROUP=unit if unit > 1 else kernels.GROUP,
            SLAB=columns != rows.vocabulary,
            ENTROPY=with_entropy,
            EXTRA=extra.numel() > 0,
            num_warps=kernels.WARPS,
            enable_fp_fusion=True,
        )
    if parts is not None:
        finish_into(parts, columns, rows, with_entropy, logp, entropy, stats, extra)


def empty_parts(like: Tensor, count: int, parts: int, extra: Tensor) -> Tensor:
    """A tensor for the sums over each of so many parts of ``count`` rows."""
    return like.new_empty((6 if extra.numel() else 3, parts, count), dtype=torch.float32)


def finish_into(
    parts: Tensor,
    columns: int,
    rows: Rows,
    with_entropy: bool,
    logp: Tensor,
    entropy: Tensor,
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
            _or_none(entropy),
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
            ENTROPY=with_entropy,
            EXTRA=extra.numel() > 0,
            num_warps=kernels.FINISH_WARPS,
            enable_fp_fusion=True,
        )


def backward_into(grad_logits: Tensor, logits: Tensor, rows: Rows, upstream: Upstream) -> None:
    """``backward`` into ``grad_logits``, which may be ``logits``."""
    count, columns = upstream.logp.numel(), logits.shape[2]
    if count == 0:
        return
    unit = unit_of_rows(logits, grad_logits)
    from . import triton_kernels as kernels

    pieces = segments(columns)
    with torch.cuda.device_of(logits):
        kernels.backward_kernel[(count * pieces,)](
            grad_logits,
            logits,
            *head_arguments(rows),
            *row_arguments(rows),
            *upstream,
            rows.ignore_index,
            count,
            logits.shape[1],
            *strides_of(logits, unit),
            *strides_of(grad_logits, unit),
            columns // unit,
            token.SEGMENT // unit,
            pieces,
            rows.first,
            rows.vocabulary,
            UNIT=unit,
            BLOCK=kernels.BLOCK,
            num_warps=kernels.WARPS,
            enable_fp_fusion=True,
        )


def head_arguments(rows: Rows) -> tuple[Tensor | None, float | None, float | None]:
    """bias, logit_scale and softcap for a kernel, None for a step that changes nothing."""
    scale = None if rows.logit_scale == 1.0 else float(rows.logit_scale)
    return rows.bias, scale, None if rows.softcap == 0.0 else float(rows.softcap)


def row_arguments(rows: Rows) -> tuple[Tensor, Tensor | None, float]:
    """targets, temperatures and temperature for a kernel."""
    return rows.targets, rows.temperatures, float(rows.temperature)


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def strides_of(tensor: Tensor, unit: int) -> tuple[int, int]:
    """The strides of B and T in units; that of a dimension of size 1 is never used."""
    batch, token = (0 if tensor.shape[i] == 1 else tensor.stride(i) // unit for i in (0, 1))
    return batch, token


def unit_of_rows(first: Tensor, *others: Tensor) -> int:
    """How many elements a vector of the first of (B, T, V) tensors holds, where all rows begin and end on vectors; else 1."""
    unit = VECTOR_BYTES // first.element_size()
    return 1 if first.shape[2] % unit or not _rows_are_multiples_of(unit, first, *others) else unit


def _rows_are_multiples_of(unit: int, *tensors: Tensor) -> bool:
    """Whether every row of (B, T, V) tensors begins on a boundary of ``unit`` elements."""
    return unit == 1 or all(
        tensor.data_ptr() % VECTOR_BYTES == 0 and all(stride % unit == 0 for stride in strides_of(tensor, 1))
        for tensor in tensors
    )
