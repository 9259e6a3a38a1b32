"""The formulas of grpo_loss in Triton: terms with their derivatives, and where a program's tokens lie.

x, o, r: log-prob under the policy, the policy that made the sample, the reference; A: advantage; c: importance ratio.
A slot is the part of one sequence that lies in one block of ``CALL.block`` tokens; slots are counted through all sequences, so
every sum over them has a fixed order, and their number follows from the shapes alone.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

LARGEST_LOG_RATIO = tl.constexpr(20.0)
LOWEST_LOG_WEIGHT = tl.constexpr(-18.420680743952367)  # log 1e-8


@triton.jit
def lesser(x, y):
    """min(x, y), NaN where either is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(x, y):
    """max(x, y), NaN where either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamped(x, low, high):
    return lesser(larger(x, low), high)


@triton.jit
def product(x, y):
    """x * y, 0 where x is 0 even if y is infinite."""
    return tl.where(x == 0.0, 0.0, x * y)


@triton.jit
def quotient(x, y):
    """x / y, where y = 0 comes with x = 0 alone: 0 / 0 is 0, and inf / inf is 1."""
    return tl.where(x == y, tl.where(y == 0.0, 0.0, 1.0), x / y)


@triton.jit
def k3_of(d):
    """e^d - d - 1, by its series where the difference would cancel."""
    series = 1.0 / 6.0 + d * (1.0 / 24.0 + d * (1.0 / 120.0 + d * (1.0 / 720.0 + d / 5040.0)))
    return tl.where(tl.abs(d) < 0.25, d * d * (0.5 + d * series), tl.exp(d) - d - 1.0)


@triton.jit
def kl_term(d, c, CALL: tl.constexpr):
    """The estimator and its derivative in x; d = r - x. "unbiased" lacks its factor c where that is of the sequence."""
    if CALL.kl == "k1":
        return -d, tl.where(d == d, 1.0, d)
    elif CALL.kl == "abs":
        return tl.abs(d), tl.where(d > 0.0, -1.0, tl.where(d < 0.0, 1.0, d))
    elif CALL.kl == "k2":
        return 0.5 * d * d, -d
    else:
        k3 = k3_of(d)
        if CALL.kl == "k3_plus":
            return k3, -d
        elif CALL.kl == "unbiased" and CALL.ratio == "token":
            # d(c k3)/dx = c k3 + c (1 - e^d) = -c d
            return c * k3, -c * d
        else:
            # 1 - e^d
            return k3, -(k3 + d)


@triton.jit
def ratio_term(c, advantage, numbers, CALL: tl.constexpr):
    """l and dl/dlog c of the variants that are functions of the ratio; both are linear in A where its sign is kept."""
    if CALL.variant == "sapo":
        tau = tl.where(advantage > 0.0, numbers.tau_positive, numbers.tau_other)
        above, below = 1.0 / (1.0 + tl.exp(tau * (1.0 - c))), 1.0 / (1.0 + tl.exp(tau * (c - 1.0)))
        return -advantage * above * 4.0 / tau, product(-advantage * 4.0 * above * below, c)
    else:
        bounded = c
        if CALL.variant == "grpo":
            bounded = lesser(c, numbers.delta)
        unclipped = product(advantage, bounded)
        value = -lesser(unclipped, advantage * clamped(c, numbers.low, numbers.high))
        # the unclipped branch is the lesser one, and c <= delta
        slope = tl.where((unclipped > -value) | (bounded < c), 0.0, -advantage)
        if CALL.variant == "dual_clip":
            bound = -numbers.dual_bound * advantage
            binds = (advantage < 0.0) & (value > bound)
            value, slope = tl.where(binds, bound, value), tl.where(binds, 0.0, slope)
        return value, product(slope, c)


@triton.jit
def held_factor(c, log_weight, rewarded, numbers, CALL: tl.constexpr):
    """What multiplies -A x and is held constant in the variants cispo, vespo and reinforce."""
    if CALL.variant == "cispo":
        return lesser(c, numbers.high)
    elif CALL.variant == "vespo":
        log_weight = clamped(log_weight, LOWEST_LOG_WEIGHT, LARGEST_LOG_RATIO)
        k = tl.where(rewarded, numbers.k_positive, numbers.k_negative)
        lam = tl.where(rewarded, numbers.lam_positive, numbers.lam_negative)
        phi = tl.exp(lam + k * log_weight - lam * tl.exp(log_weight))
        return tl.where(phi < float("inf"), phi, 0.0)
    else:
        return tl.where(c == c, 1.0, c)


@triton.jit
def possible_of(given, at, in_mask):
    """(the tokens that take part, their x): neither policy can have made one with x = o = -inf, whose weight is 0."""
    x = load(given.logp, at, in_mask)
    impossible = x == -float("inf")
    if given.old_logp is not None:
        impossible &= load(given.old_logp, at, in_mask) == -float("inf")
    counted = in_mask & ~impossible
    return counted, tl.where(counted, x, 0.0)


@triton.jit
def token_term(c, advantage, x, numbers, CALL: tl.constexpr):
    """l and dl/dx of a token with a ratio of its own; for all variants but vespo and gmpo."""
    if CALL.variant == "cispo" or CALL.variant == "reinforce":
        slope = -held_factor(c, x, True, numbers, CALL) * advantage
        return slope * x, slope
    else:
        return ratio_term(c, advantage, numbers, CALL)


@triton.jit
def log_of_weight(weight):
    """The bounded log of a policy weight (0 to the least, NaN below 0)."""
    return clamped(tl.log(weight), LOWEST_LOG_WEIGHT, LARGEST_LOG_RATIO)


@triton.jit
def ratio_of_sequence(drift, size, CALL: tl.constexpr):
    if CALL.ratio == "sequence":
        return tl.exp(drift / size)
    else:
        return tl.exp(clamped(drift, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


@triton.jit
def sequence_term(c, size, drift, gain, loss, inner, numbers, CALL: tl.constexpr):
    """sum w l of a sequence, and what the gradients of its tokens have in common (gmpo: of those not clipped)."""
    if CALL.variant == "gmpo":
        # dG/dx = G / sum m
        value = -(gain + loss) * tl.exp(inner / size)
        return value, value / size
    elif CALL.variant == "vespo":
        value = -gain * held_factor(c, inner, True, numbers, CALL)
        value -= loss * held_factor(c, inner, False, numbers, CALL)
        return value, tl.zeros_like(value)
    elif CALL.variant == "cispo":
        share = -held_factor(c, inner, True, numbers, CALL) * (gain + loss)
        if CALL.ratio == "output":
            return share * inner, share
        else:
            return share, tl.zeros_like(share)
    else:
        value, slope = ratio_term(c, gain, numbers, CALL)
        value_of_loss, slope_of_loss = ratio_term(c, loss, numbers, CALL)
        slope += slope_of_loss
        if CALL.ratio == "sequence":
            # dlog c/dx = m / sum m
            return value + value_of_loss, slope / size
        else:
            return value + value_of_loss, tl.where(tl.abs(drift) > LARGEST_LOG_RATIO, 0.0, slope)


@triton.jit
def first_slot_of(sequence, cu_seqlens, length, CALL: tl.constexpr):
    """The number of a sequence's first slot; of sequence B: how many slots there are."""
    if cu_seqlens is None:
        return sequence * tl.cdiv(length, CALL.block)
    else:
        return tl.load(cu_seqlens + sequence).to(tl.int64) // CALL.block + sequence


@triton.jit
def place_of(slot, tokens, cu_seqlens, length, sequences, CALL: tl.constexpr):
    """The sequence of a slot, its places, which of them lie in the sequence, and which are this slot's to write."""
    if cu_seqlens is None:
        blocks = tl.cdiv(length, CALL.block)
        # a grid has less than 2^31 programs, and a division of 64 bits is a call that spills registers
        sequence = (slot.to(tl.int32) // blocks.to(tl.int32)).to(tl.int64)
        at = (slot - sequence * blocks) * CALL.block + tl.arange(0, CALL.block)
        return sequence, sequence * length + at, at < length, at < length
    else:
        # the last sequence whose first slot is not behind this one
        sequence, behind = slot * 0, sequences
        while behind - sequence > 1:
            middle = (sequence + behind) // 2
            later = first_slot_of(middle, cu_seqlens, length, CALL) > slot
            sequence, behind = tl.where(later, sequence, middle), tl.where(later, middle, behind)
        at = (slot - sequence) * CALL.block + tl.arange(0, CALL.block)
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), tokens)
        # tokens outside all boundaries (an error that only the CPU sees) are written by the first or the last sequence
        first, last = tl.where(sequence == 0, 0, start), tl.where(sequence == sequences - 1, tokens, end)
        return sequence, at, (at >= start) & (at < end), (at >= first) & (at < last)


@triton.jit
def load(values, at, counted):
    """Values in float32; 0 where a token does not count, whatever stands there."""
    return tl.load(values + at, mask=counted, other=0.0).to(tl.float32)


@triton.jit
def load_either(values, sequence, at, counted, A_SEQUENCE: tl.constexpr):
    """Values that stand once a sequence, or at every token."""
    if A_SEQUENCE:
        return tl.where(counted, tl.load(values + sequence).to(tl.float32), 0.0)
    else:
        return load(values, at, counted)


@triton.jit
def log_ratio_of(old_logp, x, at, counted):
    """x - o; without o the policy itself made the sample (x - x, for NaN stays NaN)."""
    if old_logp is None:
        return x - x
    else:
        return x - load(old_logp, at, counted)
