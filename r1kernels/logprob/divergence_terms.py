"""What one token of the vocabulary adds to a divergence of teacher and student, and its slope: plain PyTorch, no term cancels.

With p_T, p_S the probabilities, P the larger one, t = |log p_T - log p_S| and h = e^-t - 1 (the smaller one is P (1 + h)):

    phi(t)   = t + h                      >= 0, near t^2 / 2
    kappa(x) = (1 + x) log(1 + x) - x     >= 0, near x^2 / 2
    m        = beta p_T + (1 - beta) p_S = P (1 + w h),   w: the share of the smaller one in m

    KL(a | b) = sum_v [ a log(a / b) - a + b ]                       = sum_v P phi(t) where a is the larger, P kappa(h) elsewhere
    JSD       = beta KL(p_T | m) + (1 - beta) KL(p_S | m)            = sum_v P (w kappa(h) - kappa(w h))

The sums over the whole vocabulary (or over events that make up all of it) are those of the textbook, since probabilities sum
to 1; every term is >= 0 and of second order where the two agree, as the divergence is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "jsd")
"""KL(teacher | student), KL(student | teacher), and the Jensen-Shannon divergence with ``beta`` the teacher's share."""

# of phi(t) / t^2 in -t, and of (atanh(s) - s) / s^3 in s^2: enough for float64 at t <= 1 and s^2 <= 1/9
_PHI = [1 / math.factorial(n + 2) for n in range(18)]
_ATANH = [1 / (2 * n + 3) for n in range(16)]


def terms(log_student: Tensor, log_teacher: Tensor, kind: str, beta: float) -> Tensor:
    """What is summed to the divergence, elementwise, from log-probs; -inf on one side may make it infinite, on both it is 0."""
    if kind == "reverse_kl":
        log_student, log_teacher = log_teacher, log_student
    teacher_leads = log_teacher >= log_student
    larger, t, h = _pair(log_student, log_teacher)
    kappa_h = _kappa_of_gap(t, h)
    if kind == "jsd":
        w = _share_of_smaller(teacher_leads, beta, h)
        found = w * kappa_h - _kappa(w * h)
    else:
        found = torch.where(teacher_leads, _phi(t, h), kappa_h)
    return torch.where(larger == 0, 0.0, larger * found)


def log_ratios(log_student: Tensor, log_teacher: Tensor, kind: str, beta: float) -> Tensor:
    """log(p_S / p_T), for "jsd" log(p_S / m)."""
    if kind == "reverse_kl":
        return log_student - log_teacher
    teacher_leads = log_teacher >= log_student
    _, t, h = _pair(log_student, log_teacher)
    return torch.where(teacher_leads, -t, 0.0) - (_share_of_smaller(teacher_leads, beta, h) * h).log1p()


class Mean(NamedTuple):
    """The mean of the log-ratios under the student: in two parts, since it is close to the first where one logit leads."""

    at_largest: Tensor  # (..., 1): that of the student's most probable id
    above: Tensor  # (..., 1): the mean less that


def mean_ratio(log_student: Tensor, log_teacher: Tensor, kind: str, beta: float) -> Mean | None:
    """What the slopes of a row (..., V) refer to; None: nothing."""
    if kind == "forward_kl":
        return None
    ratios = log_ratios(log_student, log_teacher, kind, beta)
    at_largest = ratios.gather(-1, log_student.argmax(-1, keepdim=True))
    student = log_student.exp()
    weighted = torch.where(student == 0, 0.0, student * (ratios - at_largest))
    return Mean(at_largest, weighted.sum(-1, keepdim=True))


def slopes(log_student: Tensor, log_teacher: Tensor, kind: str, beta: float, mean: Mean | None) -> Tensor:
    """d divergence / d x_v of the student's scaled logits."""
    if mean is None:
        # d / d x_v = p_S - p_T
        larger, _, h = _pair(log_student, log_teacher)
        return torch.where(log_teacher >= log_student, larger * h, -larger * h)
    # with r = log(p_S / p_T), for JSD log(p_S / m): d / d x_v = share p_S (r - sum p_S r)
    ratios = log_ratios(log_student, log_teacher, kind, beta)
    student = (1 - beta if kind == "jsd" else 1.0) * log_student.exp()
    return torch.where(student == 0, 0.0, student * (ratios - mean.at_largest - mean.above))


def _pair(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, t, h"""
    t = torch.where(log_student == log_teacher, 0.0, (log_student - log_teacher).abs())
    return torch.maximum(log_student, log_teacher).exp(), t, (-t).expm1()


def _share_of_smaller(teacher_leads: Tensor, beta: float, h: Tensor) -> Tensor:
    """w, in the dtype of h: two numbers alone would be of torch's default dtype."""
    return torch.where(teacher_leads, h.new_full((), 1 - beta), beta)


def _phi(t: Tensor, h: Tensor) -> Tensor:
    near = t.clamp(max=1)
    return torch.where(t < 1, near * near * _series(_PHI, -near), t + h)


def _kappa_of_gap(t: Tensor, h: Tensor) -> Tensor:
    """kappa(h), where log(1 + h) = -t is known."""
    return torch.where(t < 1, -_phi(t, h) - h * t, -h - torch.where(h == -1, 0.0, (1 + h) * t))


def _kappa(x: Tensor) -> Tensor:
    """kappa(x) for x in (-1, 0]: with s = x / (2 + x), log(1 + x) = 2 atanh(s) and atanh(s) = s + s^3 q."""
    s = x / (2 + x)
    near = 2 * s * s * (1 + (1 + s) * s * _series(_ATANH, s * s)) / (1 - s)
    return torch.where(x > -0.5, near, (1 + x) * x.log1p() - x)


def _series(coefficients: list[float], x: Tensor) -> Tensor:
    """sum_n coefficients[n] x^n; float32 needs no more than half of them."""
    if x.dtype != torch.float64:
        coefficients = coefficients[: len(coefficients) // 2]
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result
