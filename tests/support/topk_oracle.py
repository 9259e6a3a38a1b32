"""A top-k divergence of one token and its gradient by the textbook formulas in 60 decimal digits, where nothing cancels."""

from __future__ import annotations

import functools

import mpmath
import torch
from torch import Tensor

from tests.support import logprob_oracle

# the least that a teacher's rest counts
LEAST_REST = 2.0**-24


@functools.cache  # every backend asks for the same rows
def row(
    logits: tuple[float, ...],
    kept: tuple[tuple[int, float], ...],
    kind: str,
    *,
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> tuple[float, list[float]]:
    """(divergence, its gradient in the logits); kept holds ids and the teacher's log-probs of them."""
    with mpmath.workdps(60):
        probs, _, _ = logprob_oracle.softmax(logits, temperature)
        student = [probs[v] for v, _ in kept]
        teacher = [mpmath.exp(logp) for _, logp in kept]
        if tail == "bucket":
            listed = {v for v, _ in kept}
            student.append(mpmath.fsum(p for v, p in enumerate(probs) if v not in listed))
            teacher.append(max(1 - mpmath.fsum(teacher), mpmath.mpf(LEAST_REST)))
            sum_of_teacher = mpmath.fsum(teacher)
            teacher = [p / sum_of_teacher for p in teacher]
        value = mpmath.mpf(0)
        slopes = []  # d value / d log p_S of each event
        for p, q in zip(teacher, student, strict=True):
            mean = beta * p + (1 - beta) * q
            if kind == "forward_kl":
                value += p * mpmath.log(p / q)
                slopes.append(-p)
            elif kind == "reverse_kl":
                value += q * mpmath.log(q / p)
                slopes.append(q * (mpmath.log(q / p) + 1))
            else:
                value += beta * p * mpmath.log(p / mean) + (1 - beta) * q * mpmath.log(q / mean)
                slopes.append((1 - beta) * q * mpmath.log(q / mean))
        # d log p_e / d x_v = 1[v in e] p_v / p_e - p_v
        together = mpmath.fsum(slopes)
        of_rest = slopes[-1] / student[-1] if tail == "bucket" else 0
        common = (of_rest - together) / temperature
        gradient = [float(p * common) for p in probs]
        for (v, _), slope in zip(kept, slopes, strict=False):
            gradient[v] = float((slope - probs[v] * together) / temperature)
        return float(value), gradient


def rows(
    logits: Tensor, ids: Tensor, teacher_logp: Tensor, kind: str, **options: float | str
) -> tuple[Tensor, Tensor]:
    """(divergences (N,), gradients (N, V)) of logits (N, V) in float64, for an upstream gradient of 1.

    Ids below 0 are padding.
    """
    found = []
    for x, row_ids, row_logp in zip(
        logits.double(), ids.tolist(), teacher_logp.double().tolist(), strict=True
    ):
        kept = tuple((v, logp) for v, logp in zip(row_ids, row_logp, strict=True) if v >= 0)
        found.append(row(tuple(x.tolist()), kept, kind, **options))
    return (
        torch.tensor([value for value, _ in found], dtype=torch.float64),
        torch.tensor([gradient for _, gradient in found], dtype=torch.float64),
    )
