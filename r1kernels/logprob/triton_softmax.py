"""The mathematics that the Triton kernels of the log-probs share: logits from raw ones, sums of a softmax, results of a row.

Imports Triton: import this module only where a kernel is launched. A set of logits z with x = z / T is summed up by

    M  = the largest z                                      (-inf for an empty set)
    S' = sum of e^(x - M/T) over all but one largest        none of the sums cancels
    E' = sum of e^(x - M/T) (M/T - x)                       (terms whose exponential is 0 count as 0; in bits inside a kernel)

and, where the statistics of ``linear_logprobs`` are wanted,

    Q' = sum of e^(2 (x - M/T)) over all but one largest
    L  = sum of z                          P = the first place of a largest z

Exponents are powers of 2: ``rate`` = log2(e) / T turns a difference of logits into bits. How two sets merge and the derivatives
stand above the code in csrc/logprob/cuda.cuh. Q' merges as S' does, with w^2 for w. NaN enters S' and stays there.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2**31 - 1)  # P of an empty set
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(256.0)  # bits; 2^-FAR is 0 in float32, and 0 FAR is 0 where 0 inf is not
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def power_of_2(x):
    """2^x; results below 2^-126 are 0, which saves three of the four instructions that tl.exp2 needs."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


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
def tanh(u):
    """(tanh u, 1 - tanh^2 u), both to a few roundings (Triton has no tanh that its interpreter knows).

    With e = e^-2|u|: (1 - e) / (1 + e), which cancels for small u, where an odd polynomial stands in (its coefficients were
    fitted to the least relative error on |u| < 0.55, 1e-9), and 4 e / (1 + e)^2, which never cancels.
    """
    magnitude = tl.abs(u)
    e = power_of_2(magnitude * (-2.0 * LOG2_E))
    large = (1.0 - e) / (1.0 + e)
    s = u * u
    p = ((-0.0062742196 * s + 0.0210716631) * s - 0.0538523048) * s + 0.1333258599
    small = u + u * (s * (p * s - 0.3333331645))
    value = tl.where(magnitude < 0.55, small, tl.where(u < 0.0, -large, large))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def head_logits(raw, bias, logit_scale, softcap):
    """(z, dz / draw) of z = cap(logit_scale * (raw + bias)), cap(u) = softcap tanh(u / softcap); None: without that step."""
    z = raw
    slope = 1.0
    if bias is not None:
        z += bias
    if logit_scale is not None:
        z *= logit_scale
        slope = logit_scale
    if softcap is not None:
        z, bend = tanh(z * (1.0 / softcap))
        z *= softcap
        slope *= bend
    return z, slope


@triton.jit
def inverse_temperature_of(temperatures, temperature, row, keep):
    """1 / T of rows; NaN, which makes a row NaN, for a temperature that is not a number above 0."""
    if temperatures is not None:
        temperature = tl.load(temperatures + row, mask=keep, other=1.0)
    return tl.where((temperature > 0.0) & (temperature < float("inf")), 1.0 / temperature, float("nan"))


@triton.jit
def match(a, b):
    """(losers, winners) of two tensors, element by element; NaN wins and loses."""
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(a, b, propagate_nan=nan), tl.maximum(a, b, propagate_nan=nan)


@triton.jit
def neighbours(z, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """The even and the odd columns of z (ROWS, 2 PAIRS)."""
    return tl.split(tl.reshape(z, (ROWS, PAIRS, 2)))


@triton.jit
def halves(z, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the last COLUMNS columns of z (ROWS, 2 COLUMNS)."""
    return tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS)), (0, 2, 1)))


@triton.jit
def group_sums(
    z, place, keep, rate, ROWS: tl.constexpr, GROUP: tl.constexpr, ENTROPY: tl.constexpr, EXTRA: tl.constexpr
):
    """(M, (S', E', Q', L, P)) of each row of logits z (ROWS, GROUP), GROUP 4 or 8, of which ``keep`` count for L.

    In a knock-out tournament all but one largest lose once: the losers are the terms of S', one exponential each.
    """
    winners = z
    if GROUP == 8:
        a, b = neighbours(winners, ROWS, 4)
        losers_of_8, winners = match(a, b)
    a, b = neighbours(winners, ROWS, 2)
    losers_of_4, winners = match(a, b)
    a, b = neighbours(winners, ROWS, 1)
    losers_of_2, winners = match(a, b)
    top = tl.where(winners == float("-inf"), 0.0, winners)  # an empty set has no distances
    sums = add(
        sums_below(losers_of_4, top, rate, ENTROPY, EXTRA), sums_below(losers_of_2, top, rate, ENTROPY, EXTRA)
    )
    if GROUP == 8:
        sums = add(sums, sums_below(losers_of_8, top, rate, ENTROPY, EXTRA))
    total = 0.0
    first = 0
    if EXTRA:
        total = tl.sum(tl.where(keep, z, 0.0), axis=1)
        first = tl.min(tl.where(z == winners, place, NOWHERE), axis=1)
    return tl.sum(winners, axis=1), (sums[0], sums[1], sums[2], total, first)


@triton.jit
def tile_sums(
    a,
    b,
    c,
    d,
    column,
    size,
    rate,
    ROWS: tl.constexpr,
    QUARTER: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """As ``group_sums`` for rows of four quarters (ROWS, QUARTER) that begin at ``column``; of ``size`` columns at most.

    Quarters are matched, so that a thread needs nothing of another before the last quarter of the terms.
    """
    losers_ab, winners_ab = match(a, b)
    losers_cd, winners_cd = match(c, d)
    losers, winners = match(winners_ab, winners_cd)
    top = tl.max(winners, axis=1)
    finite = tl.where(top == float("-inf"), 0.0, top)[:, None]
    largest = winners == top[:, None]
    weight, spread, squares = terms_below(winners, finite, rate, ENTROPY, EXTRA)
    terms = (tl.where(largest, 0.0, weight), spread, tl.where(largest, 0.0, squares))
    terms = folded(terms, ROWS, QUARTER, ENTROPY, EXTRA)
    below = terms_below(losers, finite, rate, ENTROPY, EXTRA)
    terms = add(terms, folded(below, ROWS, QUARTER, ENTROPY, EXTRA))
    below = terms_below(losers_ab, finite, rate, ENTROPY, EXTRA)
    terms = add(terms, folded(below, ROWS, QUARTER, ENTROPY, EXTRA))
    below = terms_below(losers_cd, finite, rate, ENTROPY, EXTRA)
    terms = add(terms, folded(below, ROWS, QUARTER, ENTROPY, EXTRA))
    more = more_than_one(largest, top, 1)
    others = tl.sum(terms[0], axis=1) + more
    row_spread = 0.0
    row_squares = 0.0
    if ENTROPY:
        row_spread = tl.sum(terms[1], axis=1)
    if EXTRA:
        row_squares = tl.sum(terms[2], axis=1) + more
    total = 0.0
    first = 0
    if EXTRA:
        v = column + tl.arange(0, QUARTER)[None, :]
        total = tl.sum(
            tl.where(v < size, a, 0.0)
            + tl.where(v + QUARTER < size, b, 0.0)
            + tl.where(v + 2 * QUARTER < size, c, 0.0)
            + tl.where(v + 3 * QUARTER < size, d, 0.0),
            axis=1,
        )
        last = tl.where(d == top[:, None], v + 3 * QUARTER, NOWHERE)
        last = tl.where(c == top[:, None], v + 2 * QUARTER, last)
        last = tl.where(b == top[:, None], v + QUARTER, last)
        first = tl.min(tl.where(a == top[:, None], v, last), axis=1)
    return top, (others, row_spread, row_squares, total, first)


@triton.jit
def folded(terms, ROWS: tl.constexpr, QUARTER: tl.constexpr, ENTROPY: tl.constexpr, EXTRA: tl.constexpr):
    """The terms of a quarter; of a wide one the sums of its two halves, since whole ones beside the logits would spill."""
    weight, spread, squares = terms
    if QUARTER > 32:
        a, b = halves(weight, ROWS, QUARTER // 2)
        weight = a + b
        if ENTROPY:
            a, b = halves(spread, ROWS, QUARTER // 2)
            spread = a + b
        if EXTRA:
            a, b = halves(squares, ROWS, QUARTER // 2)
            squares = a + b
    return weight, spread, squares


@triton.jit
def add(a, b):
    """The sums of two triples."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def terms_below(z, top, rate, ENTROPY: tl.constexpr, EXTRA: tl.constexpr):
    """The terms of S', E' and Q' that logits z give under a largest one."""
    distance = (top - z) * rate
    weight = power_of_2(-distance)
    spread = 0.0
    squares = 0.0
    if ENTROPY:
        spread = weight * tl.minimum(distance, FAR)
    if EXTRA:
        squares = weight * weight
    return weight, spread, squares


@triton.jit
def sums_below(z, top, rate, ENTROPY: tl.constexpr, EXTRA: tl.constexpr):
    """The sums over each row of ``terms_below``."""
    weight, spread, squares = terms_below(z, top, rate, ENTROPY, EXTRA)
    if ENTROPY:
        spread = tl.sum(spread, axis=1)
    if EXTRA:
        squares = tl.sum(squares, axis=1)
    return tl.sum(weight, axis=1), spread, squares


@triton.jit
def more_than_one(largest, top, AXIS: tl.constexpr):
    """How many logits reach the largest, but for the one that S' leaves out; 0 for an empty set."""
    count = tl.sum(largest.to(tl.int32), axis=AXIS) - 1
    return tl.where(top == float("-inf"), 0.0, count.to(tl.float32))


@triton.jit
def reduced(z, sums, rate, ENTROPY: tl.constexpr, EXTRA: tl.constexpr):
    """(M, (S', E', Q', L, P)) of the union along the first axis of sets with the largest logits z and those sums."""
    others, spread, squares, total, place = sums
    top = tl.max(z, axis=0)
    largest = z == top
    # an empty union has no distances
    distance = (tl.where(top == float("-inf"), 0.0, top) - z) * rate
    weight = power_of_2(-distance)
    more = more_than_one(largest, top, 0)
    row_others = tl.sum(tl.where(largest, 0.0, weight) + weight * others, axis=0) + more
    row_spread = 0.0
    row_squares = 0.0
    row_total = 0.0
    row_place = 0
    if ENTROPY:
        row_spread = tl.sum(weight * (spread + tl.minimum(distance, FAR) * (1.0 + others)), axis=0)
    if EXTRA:
        squared = weight * weight
        row_squares = tl.sum(tl.where(largest, 0.0, squared) + squared * squares, axis=0) + more
        row_total = tl.sum(total, axis=0)
        row_place = tl.min(tl.where(largest, place, NOWHERE), axis=0)
    return top, (row_others, row_spread, row_squares, row_total, row_place)


@triton.jit
def merged(a, a_sums, b, b_sums, rate, ENTROPY: tl.constexpr, EXTRA: tl.constexpr):
    """(M, (S', E', Q', L, P)) of the union of two sets, the first of which comes first in the vocabulary."""
    a_others, a_spread, a_squares, a_total, a_place = a_sums
    b_others, b_spread, b_squares, b_total, b_place = b_sums
    swap = b > a
    distance = tl.abs(a - b) * rate
    distance = tl.where(tl.minimum(a, b) == float("-inf"), FAR, distance)
    weight = power_of_2(-distance)
    low_others = 1.0 + tl.where(swap, a_others, b_others)
    others = tl.where(swap, b_others, a_others) + weight * low_others
    spread, squares, total, place = a_spread, a_squares, a_total, a_place
    if ENTROPY:
        grown = tl.where(swap, a_spread, b_spread) + tl.minimum(distance, FAR) * low_others
        spread = tl.where(swap, b_spread, a_spread) + weight * grown
    if EXTRA:
        low_squares = 1.0 + tl.where(swap, a_squares, b_squares)
        squares = tl.where(swap, b_squares, a_squares) + weight * weight * low_squares
        total = a_total + b_total
        place = tl.where(swap, b_place, a_place)
    return tl.where(swap, b, a), (others, spread, squares, total, place)


@triton.jit
def store_row(
    row,
    keep,
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
    SLAB: tl.constexpr,
):
    """Write the results of rows from the sums over their logits and the logit of their target (token.row_results)."""
    others, spread, squares, total, place = sums
    spread *= LN_2
    ignored = target == ignore_index
    here = (target >= first) & (target - first < size)
    broken = (top == float("inf")) | (inverse_temperature != inverse_temperature)
    if not SLAB:
        broken |= top == float("-inf")
    others = tl.where(broken, float("nan"), others)
    log_normaliser = log1p(others)
    if SLAB:
        top = tl.where(others == others, top, float("nan"))  # whoever merges sees a broken row by its M
        value = chosen
    else:
        value = (chosen - top) * inverse_temperature - log_normaliser
    tl.store(logp + row, tl.where(ignored, 0.0, tl.where(here, value, float("nan"))), mask=keep)
    tl.store(stats + row, tl.where(ignored, 0.0, top), mask=keep)
    tl.store(stats + rows + row, tl.where(ignored, 0.0, others), mask=keep)
    tl.store(stats + 2 * rows + row, tl.where(ignored, 0.0, spread), mask=keep)
    if entropy is not None:
        value = tl.where(here, log_normaliser + spread / (1.0 + others), float("nan"))
        tl.store(entropy + row, tl.where(ignored, 0.0, value), mask=keep)
    if extra is not None:
        value = log1p(squares) - 2.0 * log_normaliser
        tl.store(extra + row, tl.where(ignored, 0.0, value), mask=keep)
        value = total * inverse_temperature / size
        tl.store(extra + rows + row, tl.where(ignored, 0.0, value), mask=keep)
        is_top = (place == target - first) & (others == others)
        tl.store(extra + 2 * rows + row, tl.where(ignored, 0.0, is_top.to(tl.float32)), mask=keep)
