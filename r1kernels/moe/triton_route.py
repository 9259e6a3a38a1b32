"""The Triton kernels of the router: one program a token.

Scores are computed in float64 and rounded once to float32, so that equal logits have equal scores on every device. The
choice compares their keys: integers in the order of the floats, NaN above everything. T tokens, E experts, K experts per
token.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

NOT_ELIGIBLE = tl.constexpr(-(2**31))  # below the key of every float
NAN_KEY = tl.constexpr(2**31 - 1)
SIGMOID = tl.constexpr(0)  # the places in reference.SCORES
SOFTMAX = tl.constexpr(1)


@triton.jit
def route_kernel(
    logits,  # (T, E)
    bias,  # (E,) float32 or None
    replayed,  # (T, K) int64 or None: choose
    weights,  # (T, K) float32
    indices,  # (T, K) int64
    counts,  # (E,) int32, zeros
    experts,
    top_k,
    n_group,
    topk_group,
    eps: tl.float64,
    scale: tl.float64,
    SCORE: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    TWO_BEST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,  # n_group, the size of a group and K, at least, in powers of two
    MEMBERS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid: T."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    used = slot < top_k
    row = logits + token * experts
    largest, inverse = 0.0, 0.0
    if replayed is None or SCORE == SOFTMAX:
        size = experts // n_group
        group, member = tl.arange(0, GROUPS)[:, None], tl.arange(0, MEMBERS)[None, :]
        real = (group < n_group) & (member < size)
        expert = group * size + member
        logit = tl.load(row + expert, mask=real, other=float("-inf")).to(tl.float64)
        if SCORE == SOFTMAX:
            largest, inverse = softmax_sums(tl.reshape(logit, (GROUPS * MEMBERS,)))
        if replayed is None:
            selection = logit.to(tl.float32) if BY_LOGITS else score_of(logit, largest, inverse, SCORE)
            if bias is not None:
                selection += tl.load(bias + expert, mask=real, other=0.0)
            keys = tl.where(real, key_of(selection), NOT_ELIGIBLE)
            if GROUPS > 1:
                keys = keep_best_groups(keys, n_group, topk_group, size, TWO_BEST, GROUPS, MEMBERS)
            chosen = choose(keys, expert, slot, top_k)
    if replayed is not None:
        chosen = tl.load(replayed + token * top_k + slot, mask=used, other=-1)
    tl.store(indices + token * top_k + slot, chosen, mask=used)

    inside = used & (chosen >= 0) & (chosen < experts)
    logit = tl.load(row + chosen, mask=inside, other=float("-inf")).to(tl.float64)
    if SCORE == SOFTMAX and NORMALIZE:
        of_all = inverse  # NaN if any logit is NaN or +inf
        largest, inverse = softmax_sums(logit)
        weight = tl.exp(logit - largest) * tl.where(of_all == of_all, inverse, of_all)
    else:
        weight = tl.where(inside, score_of(logit, largest, inverse, SCORE).to(tl.float64), 0.0)
        if NORMALIZE:
            weight = weight / (tl.sum(weight, axis=0) + eps)
    weight = tl.where(inside, scale * weight, 0.0)
    tl.store(weights + token * top_k + slot, weight.to(tl.float32), mask=used)
    tl.atomic_add(counts + chosen, 1, mask=inside, sem="relaxed")  # of integers: in any order


@triton.jit
def route_backward_kernel(
    grad_weights,  # (T, K) float32
    logits,  # (T, E)
    indices,  # (T, K) int64
    grad_logits,  # (T, E)
    experts,
    top_k,
    eps: tl.float64,
    scale: tl.float64,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,  # E and K, at least, in powers of two
    SLOTS: tl.constexpr,
):
    """Grid: T. l logits, p scores, w weights, c scale, g gradient of the weights, n = sum p + eps."""
    token = tl.program_id(0).to(tl.int64)
    slot, expert = tl.arange(0, SLOTS), tl.arange(0, EXPERTS)
    used = slot < top_k
    chosen = tl.load(indices + token * top_k + slot, mask=used, other=-1)
    inside = used & (chosen >= 0) & (chosen < experts)
    chosen = tl.where(inside, chosen, -1).to(tl.int32)
    row = logits + token * experts
    logit = tl.load(row + chosen, mask=inside, other=float("-inf")).to(tl.float64)
    grad = tl.load(grad_weights + token * top_k + slot, mask=inside, other=0.0).to(tl.float64)
    if SCORE != SOFTMAX:
        # dl_j = c p'_j g_j, or with normalize c / n (g_j - sum_i g_i p_i / n) p'_j
        p, slope = score_with_slope(logit, SCORE)
        p, slope = tl.where(inside, p, 0.0), scale * tl.where(inside, slope, 0.0)
        if NORMALIZE:
            total = tl.sum(p, axis=0) + eps
            grad -= tl.sum(grad * p, axis=0) / total
            slope = slope / total
        share = sum_of_chosen(slope * grad, chosen, slot, expert, top_k)
    elif NORMALIZE:
        # dl_j = c w_j (g_j - sum_i g_i w_i)
        largest, inverse = softmax_sums(logit)
        w = tl.where(inside, tl.exp(logit - largest) * inverse, 0.0)
        share = sum_of_chosen(scale * w * (grad - tl.sum(grad * w, axis=0)), chosen, slot, expert, top_k)
    else:
        # dl_e = c p_e (sum_{k chose e} g_k - sum_k g_k p_k)
        every = tl.load(row + expert, mask=expert < experts, other=float("-inf")).to(tl.float64)
        largest, inverse = softmax_sums(every)
        p = tl.where(inside, tl.exp(logit - largest) * inverse, 0.0)
        share = sum_of_chosen(grad, chosen, slot, expert, top_k) - tl.sum(grad * p, axis=0)
        share = scale * share * (tl.exp(every - largest) * inverse)
    place = grad_logits + token * experts + expert
    tl.store(place, share.to(tl.float32).to(grad_logits.dtype.element_ty), mask=expert < experts)


@triton.jit
def sigmoid(logit):
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def softmax_sums(logit):
    """The largest logit, and 1 / sum e^(l - largest); -inf stands for logits that do not take part."""
    largest = tl.max(logit, axis=0)
    return largest, 1.0 / tl.sum(tl.exp(logit - largest), axis=0)


@triton.jit
def score_of(logit, largest, inverse, SCORE: tl.constexpr):
    """Scores in float32."""
    if SCORE == SOFTMAX:
        return (tl.exp(logit - largest) * inverse).to(tl.float32)
    else:
        return score_with_slope(logit, SCORE)[0].to(tl.float32)


@triton.jit
def score_with_slope(logit, SCORE: tl.constexpr):
    """(p, p') of a logit alone: sigmoid p, p (1 - p), or p = sqrt(softplus), sigmoid / (2 p), which is 0 where p is."""
    share = sigmoid(logit)
    if SCORE == SIGMOID:
        return share, share * sigmoid(-logit)
    else:
        root = tl.sqrt(softplus(logit))
        return root, tl.where(root == 0.0, 0.0, 0.5 * share / root)


@triton.jit
def softplus(logit):
    """log(1 + e^l) = max(l, 0) + log(1 + x), x = e^-|l|: x log(y) / (y - 1) for y = 1 + x rounded, so that no digit is lost."""
    x = tl.exp(-tl.abs(logit))
    y = 1.0 + x
    rest = tl.where(y == 1.0, x, x * (tl.log(y) / (y - 1.0)))
    return tl.where(logit != logit, logit, tl.where(logit > 0.0, logit, 0.0) + rest)


@triton.jit
def key_of(value):
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN_KEY)


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keep_best_groups(
    keys, n_group, topk_group, size, TWO_BEST: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr
):
    """keys (GROUPS, MEMBERS), not eligible outside of the best groups. The lowest group wins among equals.

    The key of a group is its best, or that of the sum of its two best selection scores.
    """
    group, member = tl.arange(0, GROUPS), tl.arange(0, MEMBERS)[None, :]
    group_keys = tl.max(keys, axis=1)
    if TWO_BEST:
        place = tl.min(tl.where(keys == group_keys[:, None], member, MEMBERS), axis=1)
        second = tl.max(tl.where(member == place[:, None], NOT_ELIGIBLE, keys), axis=1)
        of_two = key_of(value_of(group_keys) + value_of(second))
        group_keys = tl.where((size > 1) & (group < n_group), of_two, group_keys)
    kept = group < 0
    for _ in range(topk_group):
        best = tl.min(tl.where(group_keys == tl.max(group_keys, axis=0), group, GROUPS), axis=0)
        kept = kept | (group == best)
        group_keys = tl.where(group == best, NOT_ELIGIBLE, group_keys)
    return tl.where(kept[:, None], keys, NOT_ELIGIBLE)


@triton.jit
def choose(keys, expert, slot, top_k):
    """The experts of the ``top_k`` largest keys, in ``slot``; the lowest one among equals."""
    chosen = slot * 0
    for k in range(top_k):
        best = tl.max(tl.max(keys, axis=1), axis=0)
        first = tl.min(tl.min(tl.where(keys == best, expert, NAN_KEY), axis=1), axis=0)
        chosen = tl.where(slot == k, first, chosen)
        keys = tl.where(expert == first, NOT_ELIGIBLE, keys)
    return chosen


@triton.jit
def sum_of_chosen(value, chosen, slot, expert, top_k):
    """The sum of the values that chose an expert, in the order of the slots; -1 chooses none."""
    total = expert.to(tl.float64) * 0.0
    for k in range(top_k):
        here = slot == k
        choice = tl.sum(tl.where(here, chosen, 0), axis=0)
        total += tl.where(expert == choice, tl.sum(tl.where(here, value, 0.0), axis=0), 0.0)
    return total
