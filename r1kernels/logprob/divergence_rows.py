"""The row kernels of divergences: the logits of student and teacher side by side, their sums (token.py) known.

Shapes: B, T leading dimensions, N = B * T rows, V columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..op import Contiguous, Float32, Kernel, Written, nothing
from .token import Rows


class TeacherRows(NamedTuple):
    """What kernels are told about the teacher's rows beside those of the student: fields as in Rows."""

    teacher_bias: Float32 | None
    teacher_logit_scale: float
    teacher_softcap: float
    teacher_temperatures: Float32 | None
    teacher_temperature: float

    def beside(self, rows: Rows) -> Rows:
        """The rows of the teacher's logits; ``rows``: of the student's."""
        bias, logit_scale, softcap, temperatures, temperature = self
        return rows._replace(
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            temperatures=temperatures,
            temperature=temperature,
        )

    @classmethod
    def of(cls, rows: Rows) -> TeacherRows:
        """What ``beside`` undoes."""
        return cls(rows.bias, rows.logit_scale, rows.softcap, rows.temperatures, rows.temperature)


class Pair(NamedTuple):
    """What both directions are told: the sums are M, S', E' (3, N) of all columns, as the row kernels of the backend give them."""

    rows: Rows  # of the student's logits; their targets say no more than which rows are ignored
    teacher_rows: TeacherRows
    stats: Contiguous
    teacher_stats: Contiguous
    kind: int  # its place in KINDS (divergence_terms.py)
    beta: float


class PairCall(NamedTuple):
    logits: Tensor  # (B, T, V) float32; any strides on B and T, stride 1 on V
    teacher_logits: Tensor
    pair: Pair


class PairBackwardCall(NamedTuple):
    logits: Written
    teacher_logits: Tensor
    pair: Pair
    mean: Contiguous  # (2, N) float32, as ``finish`` gives it
    grad: Contiguous | None  # (N,) float32; None: ones


def _shapes(call: PairCall) -> Tensor:
    """Sums (4, N) float32 over the columns, 0 for ignored rows: the divergence, and but for the forward KL what the mean of the
    log-ratios r (divergence_terms.py) is made of: sum of p_S r over all but the largest of the student's logits, sum of r over those
    as large as that, how many they are."""
    batch, tokens, _ = call.logits.shape
    return call.logits.new_empty(4, batch * tokens)


FORWARD = Kernel("divergence_rows", PairCall, _shapes)
# the gradient of the student's raw logits goes over them
BACKWARD_OVER = Kernel("divergence_rows", PairBackwardCall, nothing, suffix="_backward_")


def sums(backend: str, student: Tensor, teacher: Tensor, pair: Pair) -> Tensor:
    """Those (4, n) of tiles (n, v) of raw logits."""
    found: Tensor = FORWARD(backend, PairCall(student.unsqueeze(0), teacher.unsqueeze(0), pair))
    return found


def finish(sums: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """(divergence (N,), mean of r (2, N)) from sums over all columns: the r of the student's largest logit, and the mean less that.

    The latter is sum p_S r - (1 - p_largest) r_largest over the others: where one logit leads all of it is small.
    """
    divergence, weighted, at_largest, largest = sums
    _, others, _ = stats
    at_largest = at_largest / largest.clamp(min=1)
    above = weighted - at_largest * ((others - (largest - 1)) / (1 + others))
    return divergence, torch.stack((at_largest, above))


def gradient_over(
    backend: str, student: Tensor, teacher: Tensor, pair: Pair, mean: Tensor, grad: Tensor | None
) -> None:
    """The gradient of the student's tile (n, v) of raw logits, over it."""
    call = PairBackwardCall(student.unsqueeze(0), teacher.unsqueeze(0), pair, mean, grad)
    BACKWARD_OVER(backend, call)
