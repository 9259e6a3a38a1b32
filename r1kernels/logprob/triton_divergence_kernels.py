"""Triton kernels of divergences: a program holds a row, the logits of student and teacher side by side, their sums known.

Imports Triton: import this module only where a kernel is launched. Shapes: B, T leading dimensions, V columns, rows N = B * T.
The mathematics, P, t, h, w, phi and kappa, is that of divergence_terms.py. Strides and V come in units of ``UNIT`` elements.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

from .divergence_terms import KINDS
from .triton_softmax import LOG2_E, head_logits, inverse_temperature_of, log1p, minus_expm1, power_of_2

BLOCK = 512  # logits of either that a program holds at a time
WARPS = 4
FORWARD_KL, REVERSE_KL, JSD = (
    tl.constexpr(KINDS.index(kind)) for kind in ("forward_kl", "reverse_kl", "jsd")
)

NOT_SPECIALISED = (
    "beta",
    "ignore_index",
    "rows",
    "tokens",
    "batch_stride",
    "token_stride",
    "teacher_batch_stride",
    "teacher_token_stride",
    "columns",
)


@triton.jit
def phi_of(t, h):
    """phi(t) = t + h"""
    p = 2.7557319e-07 + tl.zeros_like(t)
    p = p * -t + 2.7557319e-06
    p = p * -t + 2.4801587e-05
    p = p * -t + 1.9841270e-04
    p = p * -t + 1.3888889e-03
    p = p * -t + 8.3333333e-03
    p = p * -t + 4.1666667e-02
    p = p * -t + 1.6666667e-01
    p = p * -t + 0.5
    return tl.where(t < 1.0, t * t * p, t + h)


@triton.jit
def kappa_of_gap(t, h, phi):
    """kappa(h), where log(1 + h) = -t is known"""
    return tl.where(t < 1.0, -phi - h * t, -h - tl.where(h == -1.0, 0.0, (1.0 + h) * t))


@triton.jit
def log_and_kappa(x):
    """log(1 + x) and kappa(x) for x in (-1, 0]: with s = x / (2 + x), log(1 + x) = 2 atanh(s) and atanh(s) = s + s^3 q"""
    s = x / (2.0 + x)
    u = s * s
    q = ((((u * 0.076923077 + 0.090909091) * u + 0.11111111) * u + 0.14285714) * u + 0.2) * u + 0.33333333
    log_far = tl.log(1.0 + x)
    far = x < -0.5
    log = tl.where(far, log_far, 2.0 * (s + s * u * q))
    kappa = tl.where(far, (1.0 + x) * log_far - x, 2.0 * u * (1.0 + (1.0 + s) * s * q) / (1.0 - s))
    return log, kappa


@triton.jit
def pair_of(log_student, log_teacher):
    """(whether the teacher's is the larger one, P, t, h)"""
    teacher_leads = log_teacher >= log_student
    gap = log_teacher - log_student
    t = tl.where(log_teacher == log_student, 0.0, tl.where(teacher_leads, gap, -gap))
    larger = power_of_2(tl.where(teacher_leads, log_teacher, log_student) * LOG2_E)
    return teacher_leads, larger, t, -minus_expm1(-t)


@triton.jit
def terms(log_student, log_teacher, log_largest, beta, KIND: tl.constexpr):
    """What is summed: (divergence, and as _shapes of divergence_rows.py has it, p_S r below the largest, r of the largest, their
    number)."""
    zero = tl.zeros_like(log_student)
    if KIND == REVERSE_KL:
        teacher_leads, larger, t, h = pair_of(log_teacher, log_student)
    else:
        teacher_leads, larger, t, h = pair_of(log_student, log_teacher)
    phi = phi_of(t, h)
    kappa = kappa_of_gap(t, h, phi)
    found = tl.where(teacher_leads, phi, kappa)
    ratio = log_student - log_teacher
    if KIND == JSD:
        w = tl.where(teacher_leads, 1.0 - beta, beta)
        log_mean, kappa_mean = log_and_kappa(w * h)
        found = w * kappa - kappa_mean
        ratio = tl.where(teacher_leads, -t, 0.0) - log_mean
    found = tl.where(larger == 0.0, 0.0, larger * found)
    if KIND == FORWARD_KL:
        return found, zero, zero, zero
    student = power_of_2(log_student * LOG2_E)
    largest = log_student == log_largest
    weighted = tl.where(largest | (student == 0.0), 0.0, student * ratio)
    return found, weighted, tl.where(largest, ratio, 0.0), largest.to(tl.float32)


@triton.jit
def slope_of(log_student, log_teacher, beta, at_largest, above, KIND: tl.constexpr):
    """d divergence / d x_v of the student's scaled logits; the mean of r in its two parts"""
    teacher_leads, larger, t, h = pair_of(log_student, log_teacher)
    if KIND == FORWARD_KL:
        # p_S - p_T
        return tl.where(teacher_leads, larger * h, -larger * h)
    student = power_of_2(log_student * LOG2_E)
    ratio = log_student - log_teacher
    if KIND == JSD:
        log_mean, _ = log_and_kappa(tl.where(teacher_leads, 1.0 - beta, beta) * h)
        ratio = tl.where(teacher_leads, -t, 0.0) - log_mean
        student *= 1.0 - beta
    # p_S (r - mean), for JSD times 1 - beta
    return tl.where(student == 0.0, 0.0, student * (ratio - at_largest - above))


@triton.jit
def constants_of(stats, temperatures, temperature, row, rows):
    """(M, 1 / T, log(1 + S')) of a row"""
    inverse_temperature = inverse_temperature_of(temperatures, temperature, row, True)
    return tl.load(stats + row), inverse_temperature, log1p(tl.load(stats + rows + row))


@triton.jit
def log_probs_of(logits, bias, logit_scale, softcap, v, inside, constants):
    """(log-probs, slopes of the logits in the raw ones) of the columns v of a row."""
    z = tl.load(logits + v, mask=inside, other=0.0)
    slope = 1.0
    if bias is not None or logit_scale is not None or softcap is not None:
        row_bias = None if bias is None else tl.load(bias + v, mask=inside, other=0.0)
        z, slope = head_logits(z, row_bias, logit_scale, softcap)
    largest, inverse_temperature, log_normaliser = constants
    x = (z - largest) * inverse_temperature - log_normaliser
    return tl.where(inside, x, float("-inf")), slope


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def sums_kernel(
    logits,  # (B, T, V) float32
    teacher_logits,  # the same
    bias,  # (V,) float32 or None
    logit_scale,  # None: 1
    softcap,  # None: no cap
    teacher_bias,
    teacher_logit_scale,
    teacher_softcap,
    targets,  # (N) int64
    temperatures,  # (N) float32 or None
    temperature,
    teacher_temperatures,
    teacher_temperature,
    stats,  # (3, N) float32
    teacher_stats,
    sums,  # (4, N) float32
    beta,
    ignore_index: tl.int64,
    rows: tl.int64,
    tokens: tl.int64,
    batch_stride: tl.int64,
    token_stride: tl.int64,
    teacher_batch_stride: tl.int64,
    teacher_token_stride: tl.int64,
    columns: tl.int32,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: N programs. Every lane sums up its own columns; the lanes are added at the end."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    student = logits + (batch * batch_stride + token * token_stride) * UNIT
    teacher = teacher_logits + (batch * teacher_batch_stride + token * teacher_token_stride) * UNIT
    lanes = tl.arange(0, BLOCK)
    of_student = constants_of(stats, temperatures, temperature, row, rows)
    of_teacher = constants_of(teacher_stats, teacher_temperatures, teacher_temperature, row, rows)
    zeros = tl.zeros((BLOCK,), tl.float32)
    found, weighted, at_largest, largest = zeros, zeros, zeros, zeros
    end = tl.where(tl.load(targets + row) == ignore_index, 0, columns * UNIT)
    for start in range(0, end, BLOCK):
        v = start + lanes
        inside = v < end
        x, _ = log_probs_of(student, bias, logit_scale, softcap, v, inside, of_student)
        y, _ = log_probs_of(
            teacher, teacher_bias, teacher_logit_scale, teacher_softcap, v, inside, of_teacher
        )
        new = terms(x, y, -of_student[2], beta, KIND)
        found += new[0]
        weighted += new[1]
        at_largest += new[2]
        largest += new[3]
    tl.store(sums + row, tl.sum(found, 0))
    tl.store(sums + rows + row, tl.sum(weighted, 0))
    tl.store(sums + 2 * rows + row, tl.sum(at_largest, 0))
    tl.store(sums + 3 * rows + row, tl.sum(largest, 0))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def gradient_kernel(
    logits,  # (B, T, V) float32; overwritten
    teacher_logits,
    bias,
    logit_scale,
    softcap,
    teacher_bias,
    teacher_logit_scale,
    teacher_softcap,
    targets,
    temperatures,
    temperature,
    teacher_temperatures,
    teacher_temperature,
    stats,
    teacher_stats,
    grad,  # (N) float32, or None: ones
    mean,  # (2, N) float32
    beta,
    ignore_index: tl.int64,
    rows: tl.int64,
    tokens: tl.int64,
    batch_stride: tl.int64,
    token_stride: tl.int64,
    teacher_batch_stride: tl.int64,
    teacher_token_stride: tl.int64,
    columns: tl.int32,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: N programs. Arguments as those of ``sums_kernel``."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    student = logits + (batch * batch_stride + token * token_stride) * UNIT
    teacher = teacher_logits + (batch * teacher_batch_stride + token * teacher_token_stride) * UNIT
    lanes = tl.arange(0, BLOCK)
    of_student = constants_of(stats, temperatures, temperature, row, rows)
    of_teacher = constants_of(teacher_stats, teacher_temperatures, teacher_temperature, row, rows)
    counted = tl.load(targets + row) != ignore_index
    at_largest, above = tl.load(mean + row), tl.load(mean + rows + row)
    upstream = 1.0
    if grad is not None:
        upstream = tl.load(grad + row)
    upstream *= of_student[1]
    end = columns * UNIT
    for start in range(0, end, BLOCK):
        v = start + lanes
        inside = v < end
        x, slope = log_probs_of(student, bias, logit_scale, softcap, v, inside, of_student)
        y, _ = log_probs_of(
            teacher, teacher_bias, teacher_logit_scale, teacher_softcap, v, inside, of_teacher
        )
        found = slope_of(x, y, beta, at_largest, above, KIND) * upstream * slope
        tl.store(student + v, tl.where(counted, found, 0.0), mask=inside)
