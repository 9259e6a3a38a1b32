"""The Triton backend of the rows of divergences: its ops. Triton is imported at the first launch, never before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import divergence_rows
from .divergence_rows import Pair, PairBackwardCall, PairCall
from .triton import head_arguments, row_arguments, strides_of, unit_of_rows


@divergence_rows.FORWARD.implement("triton")
def sums(call: PairCall) -> Tensor:
    batch, tokens, _ = call.logits.shape
    found = call.logits.new_empty(4, batch * tokens)
    if batch * tokens:
        from . import triton_divergence_kernels as kernels

        _launch(kernels.sums_kernel, call.logits, call.teacher_logits, call.pair, (found,))
    return found


@divergence_rows.BACKWARD_OVER.implement("triton")
def gradient_over(call: PairBackwardCall) -> None:
    if call.mean.shape[1]:
        from . import triton_divergence_kernels as kernels

        _launch(kernels.gradient_kernel, call.logits, call.teacher_logits, call.pair, (call.grad, call.mean))


def _launch(
    kernel: Any, logits: Tensor, teacher_logits: Tensor, pair: Pair, values: tuple[Tensor | None, ...]
) -> None:
    from . import triton_divergence_kernels as kernels

    rows, of_teacher = pair.rows, pair.teacher_rows.beside(pair.rows)
    batch, tokens, columns = logits.shape
    unit = unit_of_rows(logits, teacher_logits)
    with torch.cuda.device_of(logits):
        kernel[(batch * tokens,)](
            logits,
            teacher_logits,
            *head_arguments(rows),
            *head_arguments(of_teacher),
            *row_arguments(rows),
            *row_arguments(of_teacher)[1:],
            pair.stats,
            pair.teacher_stats,
            *values,
            float(pair.beta),
            rows.ignore_index,
            batch * tokens,
            tokens,
            *strides_of(logits, unit),
            *strides_of(teacher_logits, unit),
            columns // unit,
            KIND=pair.kind,
            UNIT=unit,
            BLOCK=kernels.BLOCK,
            num_warps=kernels.WARPS,
            enable_fp_fusion=True,
        )
