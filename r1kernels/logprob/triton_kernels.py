"""Triton kernels of token_logprobs: one program a row, one pass over its logits in either direction.

Imports Triton: import this module only where a kernel is launched. Shapes: B, T leading dimensions, V vocabulary, rows
B * T. The sums M, S', E' of a row, how two sets of logits merge, and the derivatives stand above the code in
csrc/logprob/cuda.cuh; M is the largest logit before the division by the temperature.

Strides and V are passed in units of ``UNIT`` elements, so that the compiler knows what they are multiples of without
specialising on their values: no recompilation when a length changes.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

BLOCK = 1024  # logits that a program holds at a time
WARPS = 4
NOT_SPECIALISED = ("ignore_index", "rows", "tokens", "vocabulary", "batch_stride", "token_stride")


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 (Triton has no log1p): with u = 1 + x rounded, log(u) / (u - 1) hardly moves where u does."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def minus_expm1(x):
    """1 - e^x for x <= 0 (Triton has no expm1): with u = e^x rounded, (1 - u) / log(u) hardly moves where u does."""
    u = tl.exp(x)
    return tl.where(u == 1.0, -x, tl.where(u == 0.0, 1.0, (1.0 - u) * (x / tl.log(u))))


@triton.jit
def weighted(weight, x):
    """weight * x, 0 where the weight is 0 even if x is infinite."""
    return tl.where(weight > 0.0, weight * x, 0.0)


@triton.jit
def inverse_temperature_of(temperatures, temperature, row):
    """1 / T of a row; NaN, which makes the row NaN, for a temperature that is not a number above 0."""
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
    return tl.where((temperature > 0.0) & (temperature < float("inf")), 1.0 / temperature, float("nan"))


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def forward_kernel(
    logits,  # (B, T, V)
    targets,  # (B * T) int64
    temperatures,  # (B * T) float32 or None
    temperature,
    logp,  # (B * T) float32
    entropy,  # (B * T) float32 or None
    stats,  # (3, B * T) float32
    ignore_index: tl.int64,
    rows: tl.int64,
    tokens: tl.int64,
    vocabulary: tl.int64,
    batch_stride: tl.int64,
    token_stride: tl.int64,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: B * T programs. Every column of the block sums up its own logits; the columns are merged at the end."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + (row // tokens * batch_stride + row % tokens * token_stride) * UNIT
    size = vocabulary * UNIT
    target = tl.load(targets + row)
    ignored = target == ignore_index
    inverse_temperature = inverse_temperature_of(temperatures, temperature, row)

    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    readable = tl.where(ignored, 0, size)
    for first in range(0, readable, BLOCK):
        z = tl.load(row_logits + first + columns, mask=first + columns < size, other=float("-inf")).to(
            tl.float32
        )
        present = z != float("-inf")
        larger = z > largest
        distance = tl.abs(z - largest) * inverse_temperature
        weight = tl.exp(-distance)
        if entropy is not None:
            grown = tl.where(
                larger,
                weighted(weight, spread + distance * (1.0 + others)),
                spread + weighted(weight, distance),
            )
            spread = tl.where(present, grown, spread)
        others = tl.where(present, tl.where(larger, weight * (1.0 + others), others + weight), others)
        largest = tl.where(larger, z, largest)

    # all columns against the largest of them; of the columns that reach it, the first one's own 1 is left out
    top = tl.max(largest, axis=0)
    distance = (top - largest) * inverse_temperature
    weight = tl.where(largest == float("-inf"), 0.0, tl.exp(-distance))
    excluded = tl.min(tl.where(largest == top, columns, BLOCK), axis=0)
    row_others = tl.sum(weight * others + tl.where(columns == excluded, 0.0, weight), axis=0)
    row_others = tl.where(tl.abs(top) < float("inf"), row_others, float("nan"))

    inside = (target >= 0) & (target < size)
    chosen = tl.load(row_logits + target, mask=(target >= 0) & (target < readable), other=float("nan")).to(
        tl.float32
    )
    log_normaliser = log1p(row_others)
    value = (chosen - top) * inverse_temperature - log_normaliser
    tl.store(logp + row, tl.where(ignored, 0.0, value))
    tl.store(stats + row, tl.where(ignored, 0.0, top))
    tl.store(stats + rows + row, tl.where(ignored, 0.0, row_others))
    row_spread = 0.0
    if entropy is not None:
        row_spread = tl.sum(weighted(weight, spread + distance * (1.0 + others)), axis=0)
        value = tl.where(inside, log_normaliser + row_spread / (1.0 + row_others), float("nan"))
        tl.store(entropy + row, tl.where(ignored, 0.0, value))
    tl.store(stats + 2 * rows + row, row_spread)


@triton.jit(do_not_specialize=(*NOT_SPECIALISED, "grad_batch_stride", "grad_token_stride"))
def backward_kernel(
    grad_logits,  # (B, T, V); may be the logits themselves
    logits,  # (B, T, V)
    targets,  # (B * T) int64
    temperatures,  # (B * T) float32 or None
    temperature,
    logp,  # (B * T) float32
    stats,  # (3, B * T) float32
    grad_logp,  # (B * T) float32 or None
    grad_entropy,  # (B * T) float32 or None
    ignore_index: tl.int64,
    rows: tl.int64,
    tokens: tl.int64,
    vocabulary: tl.int64,
    batch_stride: tl.int64,
    token_stride: tl.int64,
    grad_batch_stride: tl.int64,
    grad_token_stride: tl.int64,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: B * T programs."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    row_logits = logits + (batch * batch_stride + token * token_stride) * UNIT
    row_grad = grad_logits + (batch * grad_batch_stride + token * grad_token_stride) * UNIT
    size = vocabulary * UNIT
    target = tl.load(targets + row)
    ignored = target == ignore_index
    inside = (target >= 0) & (target < size)
    inverse_temperature = inverse_temperature_of(temperatures, temperature, row)

    largest = tl.load(stats + row)
    normaliser = tl.where(inside, 1.0 / (1.0 + tl.load(stats + rows + row)), float("nan"))
    mean_distance = tl.load(stats + 2 * rows + row) * normaliser
    at_target = minus_expm1(tl.load(logp + row))

    columns = tl.arange(0, BLOCK)
    readable = tl.where(ignored, 0, size)
    for first in range(0, size, BLOCK):
        v = first + columns
        z = tl.load(row_logits + v, mask=v < readable, other=0.0).to(tl.float32)
        distance = (largest - z) * inverse_temperature
        prob = tl.exp(-distance) * normaliser
        grad = tl.zeros((BLOCK,), tl.float32)
        if grad_logp is not None:
            slope = tl.load(grad_logp + row) * inverse_temperature
            grad += slope * tl.where(v == target, at_target, -prob)
        if grad_entropy is not None:
            slope = tl.load(grad_entropy + row) * inverse_temperature
            grad += slope * tl.where(prob == 0.0, 0.0, prob * (distance - mean_distance))
        grad = tl.where(ignored, 0.0, grad)
        tl.store(row_grad + v, grad.to(grad_logits.dtype.element_ty), mask=v < size)
