"""The first kernel of grpo_loss in Triton: one pass over the tokens, a few sums for every slot (see triton_terms.py).

One pass is enough for every variant. The terms of a ratio are linear in A where its sign is kept: where the ratio is one
value per sequence, its term is that of the sum of its A >= 0 plus that of the sum of its A < 0.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_terms import (
    LARGEST_LOG_RATIO,
    clamped,
    kl_term,
    larger,
    lesser,
    load,
    load_either,
    log_of_weight,
    log_ratio_of,
    place_of,
    possible_of,
    quotient,
    token_term,
)

SIZES = ("tokens", "length", "sequences", "slots")  # not specialised on: no recompilation when one changes

NUM_SUMS = 15
COUNT = tl.constexpr(0)  # sum m
DRIFT = tl.constexpr(1)  # sum m (x - o)
GAIN = tl.constexpr(2)  # terms of tokens: sum w p l; terms of sequences: sum w p A (or A x), over A >= 0
LOSS = tl.constexpr(3)  # the same over A < 0
KL_LOSS = tl.constexpr(4)  # sum w KL; ratio output: sum w
KL = tl.constexpr(5)  # sum m KL; ratio output: sum m (r - x)
BONUS = tl.constexpr(6)  # sum e H
ENTROPY = tl.constexpr(7)  # sum m H
LOW = tl.constexpr(8)  # tokens clipped from below; ratio of a sequence: those with A < 0
HIGH = tl.constexpr(9)  # tokens clipped from above; ratio of a sequence: those with A > 0
INNER = tl.constexpr(10)  # gmpo: sum of bounded log-ratios; vespo: log w; else: sum m x
LARGEST = tl.constexpr(11)  # max c
RATIO = tl.constexpr(12)  # sum c / max c
SQUARES = tl.constexpr(13)  # sum (c / max c)^2
IMPOSSIBLE = tl.constexpr(14)  # tokens of the mask that take no part


class Call(NamedTuple):
    """What the kernels are compiled for; the backward for the first four alone."""

    block: int  # tokens of a slot
    sequences: int  # that the loss is added up of at a time
    slots: int  # of each
    many: int  # counts or lengths read at a time
    variant: str = ""
    ratio: str = ""
    kl: str = ""
    counted: str = ""  # of ``reductions.COUNTS``
    token_terms: bool = False  # the term of a token depends on that token alone
    clips: bool = False  # the variant has a clip
    sequence_advantages: bool = False  # one per sequence, (B,)
    sequence_weights: bool = False  # policy weights likewise


@triton.jit
def store_sum(sums, slots, slot, PLACE: tl.constexpr, values):
    tl.store(sums + PLACE * slots + slot, tl.sum(values, axis=0))


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    sums,  # (NUM_SUMS, slots) float32
    given,  # loss.Tokens
    numbers,  # objective.Numbers
    tokens: tl.int64,
    length: tl.int64,
    sequences: tl.int64,
    slots: tl.int64,
    CALL: tl.constexpr,
):
    """The sums of each slot, with weights w that lack what all tokens of a sequence have in common. Grid: slots."""
    slot = tl.program_id(0).to(tl.int64)
    sequence, at, inside, _ = place_of(slot, tokens, given.cu_seqlens, length, sequences, CALL)
    in_mask = tl.load(given.mask + at, mask=inside, other=0) != 0
    counted, x = possible_of(given, at, in_mask)
    one = tl.where(counted, 1.0, 0.0)
    log_ratio = log_ratio_of(given.old_logp, x, at, counted)
    advantage = load_either(given.advantages, sequence, at, counted, CALL.sequence_advantages)
    weight = one
    if given.weights is not None:
        weight = load(given.weights, at, counted)
    policy_weight = one
    if given.policy_weights is not None:
        policy_weight = load_either(given.policy_weights, sequence, at, counted, CALL.sequence_weights)
    store_sum(sums, slots, slot, COUNT, tl.where(in_mask, 1.0, 0.0))
    store_sum(sums, slots, slot, IMPOSSIBLE, tl.where(in_mask & ~counted, 1.0, 0.0))
    store_sum(sums, slots, slot, DRIFT, log_ratio)

    c = tl.where(counted, tl.exp(log_ratio), 0.0)
    largest = tl.max(c, axis=0)
    relative = quotient(c, largest)
    tl.store(sums + LARGEST * slots + slot, largest)
    store_sum(sums, slots, slot, RATIO, relative)
    store_sum(sums, slots, slot, SQUARES, relative * relative)

    weighted = weight
    if CALL.variant != "vespo":
        weighted *= policy_weight
    if CALL.token_terms:
        value, _ = token_term(c, advantage, x, numbers, CALL)
        store_sum(sums, slots, slot, GAIN, weighted * value)
    else:
        amount = weighted * advantage
        if CALL.variant == "vespo" or (CALL.variant == "cispo" and CALL.ratio == "sequence"):
            amount *= x
        # a NaN must go somewhere
        store_sum(sums, slots, slot, GAIN, tl.where(advantage < 0.0, 0.0, amount))
        store_sum(sums, slots, slot, LOSS, tl.where(advantage < 0.0, amount, 0.0))

    low, high = advantage < 0.0, advantage > 0.0
    inner = x
    if CALL.variant == "gmpo":
        bounded = clamped(log_ratio, numbers.low, numbers.high)
        inner = tl.where(high, lesser(log_ratio, bounded), larger(log_ratio, bounded))
        inner = tl.where(low | high, inner, 0.0 * log_ratio)
        low, high = low & (log_ratio < numbers.low), high & (log_ratio > numbers.high)
    else:
        if CALL.variant == "vespo":
            inner = clamped(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
            if given.policy_weights is not None and not CALL.sequence_weights:
                inner += log_of_weight(tl.where(counted, policy_weight, 1.0))
        if CALL.ratio == "token":
            low, high = low & (c < numbers.low), high & (c > numbers.high)
    store_sum(sums, slots, slot, INNER, inner)
    store_sum(sums, slots, slot, LOW, tl.where(low, 1.0, 0.0))
    store_sum(sums, slots, slot, HIGH, tl.where(high, 1.0, 0.0))

    if given.ref_logp is not None:
        kl = load(given.ref_logp, at, counted) - x
        if CALL.ratio == "output":
            kl_value = weight
        else:
            kl, _ = kl_term(kl, c, CALL)
            kl_value = weight * kl
        store_sum(sums, slots, slot, KL, kl)
        store_sum(sums, slots, slot, KL_LOSS, kl_value)
    if given.entropy is not None:
        entropy = load(given.entropy, at, counted)
        entropy_weight = weight
        if given.entropy_weights is not None:
            entropy_weight = load(given.entropy_weights, at, counted)
        store_sum(sums, slots, slot, ENTROPY, entropy)
        store_sum(sums, slots, slot, BONUS, entropy_weight * entropy)


@triton.jit
def sums_of(sums, slots, first, end, SLOTS: tl.constexpr):
    """Every sum from COUNT to INNER, and IMPOSSIBLE, over the slots [first, end), for a vector of sequences."""
    zero = tl.zeros(first.shape, tl.float32)
    count, drift, gain, loss, kl_loss, kl = zero, zero, zero, zero, zero, zero
    bonus, entropy, low, high, inner, impossible = zero, zero, zero, zero, zero, zero
    # boundaries that do not fit (an error that only the CPU sees) must not lead outside
    first, end = tl.maximum(first, 0), tl.minimum(end, slots)
    for start in range(0, tl.max(end - first, axis=0), SLOTS):
        at = (first + start)[:, None] + tl.arange(0, SLOTS)[None, :]
        real = at < end[:, None]
        count += total(sums, slots, COUNT, at, real)
        drift += total(sums, slots, DRIFT, at, real)
        gain += total(sums, slots, GAIN, at, real)
        loss += total(sums, slots, LOSS, at, real)
        kl_loss += total(sums, slots, KL_LOSS, at, real)
        kl += total(sums, slots, KL, at, real)
        bonus += total(sums, slots, BONUS, at, real)
        entropy += total(sums, slots, ENTROPY, at, real)
        low += total(sums, slots, LOW, at, real)
        high += total(sums, slots, HIGH, at, real)
        inner += total(sums, slots, INNER, at, real)
        impossible += total(sums, slots, IMPOSSIBLE, at, real)
    return count, drift, gain, loss, kl_loss, kl, bonus, entropy, low, high, inner, impossible


@triton.jit
def total(sums, slots, PLACE: tl.constexpr, at, real):
    return tl.sum(tl.load(sums + PLACE * slots + at, mask=real, other=0.0), axis=1)


@triton.jit
def weight_of_all(sums, numbers, total_given, cu_seqlens, sequences, slots, CALL: tl.constexpr):
    """The factor of w that all tokens of the call have in common."""
    MANY: tl.constexpr = CALL.many
    divisor = numbers.divisor
    if total_given is not None:
        divisor *= tl.load(total_given)
    if CALL.counted == "batch":
        count = tl.zeros((MANY,), tl.float32)
        for start in range(0, slots, MANY):
            at = start + tl.arange(0, MANY)
            count += tl.load(sums + COUNT * slots + at, mask=at < slots, other=0.0)
        divisor *= tl.maximum(tl.sum(count, axis=0), 1.0)
    elif CALL.counted == "longest":
        longest = tl.full((MANY,), 1, tl.int64)
        for start in range(0, sequences, MANY):
            at = start + tl.arange(0, MANY)
            begin = tl.load(cu_seqlens + at, mask=at < sequences, other=0).to(tl.int64)
            end = tl.load(cu_seqlens + at + 1, mask=at < sequences, other=0).to(tl.int64)
            longest = tl.maximum(longest, end - begin)
        divisor *= tl.max(longest, axis=0).to(tl.float32)
    return 1.0 / divisor
