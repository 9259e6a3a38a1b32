"""Triton kernels of token_logprobs: a program holds a segment of a row, one pass over its logits in either direction.

Imports Triton: import this module only where a kernel is launched. Shapes: B, T leading dimensions, V vocabulary (of the
slab that is given), rows B * T, S segments of a row, as many as V asks for. The sums of a row are those of
triton_softmax.py, M being the largest logit before the division by the temperature.

Strides, V and segments are passed in units of ``UNIT`` elements, so that the compiler knows what they are multiples of
without specialising on their values: no recompilation when a length changes.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

from .triton_softmax import (
    FAR,
    LN_2,
    LOG2_E,
    NOWHERE,
    group_sums,
    head_logits,
    inverse_temperature_of,
    merged,
    minus_expm1,
    power_of_2,
    reduced,
    store_row,
)

LANES = 256  # threads' worth of sums in a forward program; a lane takes GROUP logits at a time
GROUP = 8  # where rows are no vectors
BLOCK = 1024  # logits that a backward program holds at a time
WARPS = 4
# rows of a program of the merge, parts that it holds at a time
FINISH_ROWS, FINISH_PARTS, FINISH_WARPS = 32, 32, 4

NOT_SPECIALISED = (
    "ignore_index",
    "rows",
    "tokens",
    "batch_stride",
    "token_stride",
    "vocabulary",
    "segment",
    "segments",
    "first",
)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def forward_kernel(
    logits,  # (B, T, V)
    bias,  # (V,) float32 or None
    logit_scale,  # None: 1
    softcap,  # None: no cap
    targets,  # (B * T) int64
    temperatures,  # (B * T) float32 or None
    temperature,
    logp,  # (B * T) float32; with parts: the logit of the target alone
    entropy,  # (B * T) float32 or None
    stats,  # (3, B * T) float32
    extra,  # (3, B * T) float32 or None
    parts,  # (3, S, B * T) float32, (6, S, B * T) with extra, or None: one segment is the row
    ignore_index: tl.int64,
    rows: tl.int64,
    tokens: tl.int64,
    batch_stride: tl.int64,
    token_stride: tl.int64,
    vocabulary: tl.int32,
    segment: tl.int32,
    segments: tl.int32,
    first: tl.int64,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    SLAB: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Grid: B * T * S programs. Every lane sums up its own logits, a group at a time; the lanes are merged at the end."""
    row = tl.program_id(0).to(tl.int64) // segments
    part = tl.program_id(0) % segments
    row_logits = logits + (row // tokens * batch_stride + row % tokens * token_stride) * UNIT
    size = vocabulary * UNIT
    target = tl.load(targets + row)
    ignored = target == ignore_index
    inverse_temperature = inverse_temperature_of(temperatures, temperature, row, True)
    rate = inverse_temperature * LOG2_E

    # elements of a group lie side by side in one thread where rows are vectors, else lanes do
    lane, member = tl.arange(0, LANES), tl.arange(0, GROUP)
    offsets = lane[:, None] + member[None, :] * LANES
    if UNIT > 1:
        offsets = lane[:, None] * GROUP + member[None, :]
    zeros = tl.zeros((LANES,), tl.float32)
    top = tl.full((LANES,), float("-inf"), tl.float32)
    sums = (zeros, zeros, zeros, zeros, tl.full((LANES,), NOWHERE, tl.int32))
    begin = part * segment * UNIT
    end = tl.where(ignored, begin, tl.minimum(begin + segment * UNIT, size))
    for start in range(begin, end, LANES * GROUP):
        v = start + offsets
        inside = v < end
        z = tl.load(row_logits + v, mask=inside, other=float("-inf")).to(tl.float32)
        if bias is not None or logit_scale is not None or softcap is not None:
            row_bias = None if bias is None else tl.load(bias + v, mask=inside, other=0.0)
            z = tl.where(inside, head_logits(z, row_bias, logit_scale, softcap)[0], float("-inf"))
        new_top, new_sums = group_sums(z, v, inside, rate, LANES, GROUP, ENTROPY, EXTRA)
        top, sums = merged(top, sums, new_top, new_sums, rate, ENTROPY, EXTRA)
    top, sums = reduced(top, sums, rate, ENTROPY, EXTRA)

    at = target - first
    here = (at >= begin) & (at < end)
    chosen = tl.load(row_logits + at, mask=here, other=float("nan")).to(tl.float32)
    if bias is not None or logit_scale is not None or softcap is not None:
        row_bias = None if bias is None else tl.load(bias + at, mask=here, other=0.0)
        chosen = head_logits(chosen, row_bias, logit_scale, softcap)[0]
    if parts is None:
        store_row(
            row,
            True,
            chosen,
            top,
            sums,
            target,
            inverse_temperature,
            ignore_index,
            first,
            size,
            rows,
            logp,
            entropy,
            stats,
            extra,
            SLAB,
        )
    else:
        tl.store(logp + row, chosen, mask=here)
        store_part(parts + part * rows + row, segments * rows, True, top, sums, ENTROPY, EXTRA)


@triton.jit
def store_part(parts, field_stride, keep, top, sums, ENTROPY: tl.constexpr, EXTRA: tl.constexpr):
    """Write what is known of a part of a row: M, S', E', and with extra Q', L, P."""
    tl.store(parts, top, mask=keep)
    tl.store(parts + field_stride, sums[0], mask=keep)
    if ENTROPY:
        tl.store(parts + 2 * field_stride, sums[1], mask=keep)
    if EXTRA:
        tl.store(parts + 3 * field_stride, sums[2], mask=keep)
        tl.store(parts + 4 * field_stride, sums[3], mask=keep)
        tl.store(parts + 5 * field_stride, sums[4].to(tl.float32, bitcast=True), mask=keep)


@triton.jit(do_not_specialize=("ignore_index", "rows", "parts_of_a_row", "vocabulary", "first"))
def finish_kernel(
    parts,  # (3, S, N) float32, (6, S, N) with extra
    targets,  # (N) int64
    temperatures,  # (N) float32 or None
    temperature,
    logp,  # (N) float32; before: the logit of the target, where it lies in the slab
    entropy,  # (N) float32 or None
    stats,  # (3, N) float32
    extra,  # (3, N) float32 or None
    ignore_index: tl.int64,
    rows: tl.int64,
    parts_of_a_row: tl.int32,
    vocabulary: tl.int32,
    first: tl.int64,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SLAB: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Grid: N / ROWS programs. Merges the parts of each row, in their order whatever N is."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    target = tl.load(targets + row, mask=keep, other=0)
    inverse_temperature = inverse_temperature_of(temperatures, temperature, row, keep)
    inverse_temperature += tl.zeros((ROWS,), tl.float32)
    rate = inverse_temperature * LOG2_E
    field_stride = parts_of_a_row * rows

    zeros = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = (zeros, zeros, zeros, zeros, tl.full((ROWS,), NOWHERE, tl.int32))
    for start in range(0, parts_of_a_row, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        at = parts + part * rows + row[None, :]
        given = (part < parts_of_a_row) & keep[None, :]
        largest = tl.load(at, mask=given, other=float("-inf"))
        others = tl.load(at + field_stride, mask=given, other=0.0)
        spread, squares, total, place = 0.0, 0.0, 0.0, 0
        if ENTROPY:
            spread = tl.load(at + 2 * field_stride, mask=given, other=0.0)
        if EXTRA:
            squares = tl.load(at + 3 * field_stride, mask=given, other=0.0)
            total = tl.load(at + 4 * field_stride, mask=given, other=0.0)
            place = tl.load(at + 5 * field_stride, mask=given, other=0.0).to(tl.int32, bitcast=True)
        new_sums = (others, spread, squares, total, place)
        new_top, new_sums = reduced(largest, new_sums, rate, ENTROPY, EXTRA)
        top, sums = merged(top, sums, new_top, new_sums, rate, ENTROPY, EXTRA)

    at = target - first
    chosen = tl.load(logp + row, mask=keep & (at >= 0) & (at < vocabulary), other=float("nan"))
    store_row(
        row,
        keep,
        chosen,
        top,
        sums,
        target,
        inverse_temperature,
        ignore_index,
        first,
        vocabulary,
        rows,
        logp,
        entropy,
        stats,
        extra,
        SLAB,
    )


@triton.jit(do_not_specialize=(*NOT_SPECIALISED, "whole", "grad_batch_stride", "grad_token_stride"))
def backward_kernel(
    grad_logits,  # (B, T, V); may be the logits themselves
    logits,  # (B, T, V)
    bias,  # (V,) float32 or None
    logit_scale,  # None: 1
    softcap,  # None: no cap
    targets,  # (B * T) int64
    temperatures,  # (B * T) float32 or None
    temperature,
    logp,  # (B * T) float32
    stats,  # (3, B * T) float32
    grad_logp,  # (B * T) float32, one per sequence if ``sequences`` are given, or None
    grad_entropy,  # as grad_logp
    sequences,  # (B * T) int32 or None
    ignore_index: tl.int64,
    rows: tl.int64,
    tokens: tl.int64,
    batch_stride: tl.int64,
    token_stride: tl.int64,
    grad_batch_stride: tl.int64,
    grad_token_stride: tl.int64,
    vocabulary: tl.int32,
    segment: tl.int32,
    segments: tl.int32,
    first: tl.int64,
    whole: tl.int64,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: B * T * S programs."""
    row = tl.program_id(0).to(tl.int64) // segments
    part = tl.program_id(0) % segments
    batch, token = row // tokens, row % tokens
    row_logits = logits + (batch * batch_stride + token * token_stride) * UNIT
    row_grad = grad_logits + (batch * grad_batch_stride + token * grad_token_stride) * UNIT
    target = tl.load(targets + row)
    ignored = target == ignore_index
    inverse_temperature = inverse_temperature_of(temperatures, temperature, row, True)
    rate = inverse_temperature * LOG2_E
    upstream = row if sequences is None else tl.load(sequences + row).to(tl.int64)

    largest = tl.load(stats + row)
    valid = (target >= 0) & (target < whole)
    normaliser = tl.where(valid, 1.0 / (1.0 + tl.load(stats + rows + row)), float("nan"))
    slope_logp = 0.0
    slope_entropy = 0.0
    grad_target = 0.0
    mean_bits = 0.0
    if grad_logp is not None:
        slope_logp = tl.load(grad_logp + upstream) * inverse_temperature
        grad_target = slope_logp * minus_expm1(tl.load(logp + row))
        slope_logp *= normaliser
    if grad_entropy is not None:
        mean_bits = tl.load(stats + 2 * rows + row) * normaliser * LOG2_E
        slope_entropy = tl.load(grad_entropy + upstream) * inverse_temperature * normaliser * LN_2
    at = tl.where((target >= first) & (target - first < vocabulary * UNIT), target - first, -1).to(tl.int32)

    columns = tl.arange(0, BLOCK)
    begin = part * segment * UNIT
    end = tl.minimum(begin + segment * UNIT, vocabulary * UNIT)
    if ignored:
        for start in range(begin, end, BLOCK):
            zero = tl.zeros((BLOCK,), grad_logits.dtype.element_ty)
            tl.store(row_grad + start + columns, zero, mask=start + columns < end)
    else:
        for start in range(begin, end, BLOCK):
            v = start + columns
            z = tl.load(row_logits + v, mask=v < end, other=0.0).to(tl.float32)
            slope = 1.0
            if bias is not None or logit_scale is not None or softcap is not None:
                row_bias = None if bias is None else tl.load(bias + v, mask=v < end, other=0.0)
                z, slope = head_logits(z, row_bias, logit_scale, softcap)
            distance = (largest - z) * rate
            weight = power_of_2(-distance)  # p (1 + S')
            grad = tl.zeros((BLOCK,), tl.float32)
            if grad_logp is not None:
                # d logp / d z_v = (1[v = y] - p_v) / T
                grad = tl.where(v == at, grad_target, -slope_logp * weight)
            if grad_entropy is not None:
                # d H / d z_v = p_v ((M - z_v) / T - E' / (1 + S')) / T
                grad += weight * (slope_entropy * (tl.minimum(distance, FAR) - mean_bits))
            if logit_scale is not None or softcap is not None:
                grad *= slope
            tl.store(row_grad + v, grad.to(grad_logits.dtype.element_ty), mask=v < end)
