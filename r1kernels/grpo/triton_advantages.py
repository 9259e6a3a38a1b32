"""The Triton kernel of group_advantages: one program an entry, which looks at all entries of its group. B entries.

With ``group_ids`` it walks through all B ids, in any order and without sorting; so it does for scale "batch".
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

OTHERS = 512  # entries looked at together


@triton.jit(do_not_specialize=("size", "group_size"))
def advantages_kernel(
    rewards,  # (B,) float32
    group_ids,  # (B,) int64 or None: runs of ``group_size`` entries
    valid,  # (B,) bool or None: all
    advantages,  # (B,) float32
    eps,
    size: tl.int64,
    group_size: tl.int64,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Everything in float64. Grid: B."""
    entry = tl.program_id(0).to(tl.int64)
    reward, counts = reward_of(rewards, valid, entry, size)
    first, end = entry * 0, size
    if group_ids is None:
        first = entry // group_size * group_size
        end = first + group_size

    zero = tl.zeros((OTHERS,), tl.float64)
    numbers, sums, lowest, highest = zero, zero, zero + float("inf"), zero - float("inf")
    for place in range(first, end, OTHERS):
        other = place + tl.arange(0, OTHERS)
        value, used = reward_of(rewards, valid, other, end)
        used = used & in_group(group_ids, entry, other, size)
        numbers += tl.where(used, 1.0, 0.0)
        sums += tl.where(used, value, 0.0)
        lowest = tl.where(used & (value < lowest), value, lowest)
        highest = tl.where(used & (value > highest), value, highest)
    number, total = tl.sum(numbers, axis=0), tl.sum(sums, axis=0)
    mean = total / tl.maximum(number, 1.0)
    if LEAVE_ONE_OUT:
        advantage = reward - (total - reward) / tl.maximum(number - 1.0, 1.0)
    else:
        advantage = reward - mean
        if SCALE == "batch":
            first, end = entry * 0, size
            numbers, sums = zero, zero
            for place in range(first, end, OTHERS):
                value, used = reward_of(rewards, valid, place + tl.arange(0, OTHERS), size)
                numbers += tl.where(used, 1.0, 0.0)
                sums += value
            number = tl.sum(numbers, axis=0)
            mean = tl.sum(sums, axis=0) / tl.maximum(number, 1.0)
        if SCALE != "none":
            squares = zero
            for place in range(first, end, OTHERS):
                other = place + tl.arange(0, OTHERS)
                value, used = reward_of(rewards, valid, other, end)
                if SCALE == "group":
                    used = used & in_group(group_ids, entry, other, size)
                distance = tl.where(used, value - mean, 0.0)
                squares += distance * distance
            variance = tl.sum(squares, axis=0) / tl.maximum(number - 1.0, 1.0)
            advantage = advantage / (tl.sqrt(variance) + eps)

    # equal rewards have no advantage, exactly; NaN, which no comparison sees, stays NaN
    equal = (tl.max(highest, axis=0) <= tl.min(lowest, axis=0)) & (total == total)
    tl.store(advantages + entry, tl.where(counts & (equal == 0), advantage, 0.0).to(tl.float32))


@triton.jit
def in_group(group_ids, entry, other, size):
    """Whether other entries have the id of this one; without ids all that are looked at belong to its group."""
    if group_ids is None:
        return other >= 0
    else:
        return tl.load(group_ids + other, mask=other < size, other=0) == tl.load(group_ids + entry)


@triton.jit
def reward_of(rewards, valid, entry, end):
    """Rewards in float64, 0 where they are not valid or not before ``end``; and whether they are."""
    real = entry < end
    if valid is not None:
        real = tl.load(valid + entry, mask=real, other=0) != 0
    return tl.load(rewards + entry, mask=real, other=0.0).to(tl.float64), real
