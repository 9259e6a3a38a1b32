"""The Triton kernels of the router: one program a token.

Scores are computed in float64 and rounded once to float32, so that equal logits have equal scores on every device. The
choice compares their keys: integers in the order of the floats, NaN above everything. T tokens, E experts, K experts per
token.

Most GPUs have few units for float64: one for 64 of float32. So float32 makes the choice wherever it tells what the scores
would, and float64 is left for the experts that are chosen, for those too close to each other, and for what float32 cannot
stand for: sqrt(softplus), and a softmax with a bias or with groups that are chosen by two scores.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

NOT_ELIGIBLE = tl.constexpr(-(2**31))  # below the key of every float
NAN_KEY = tl.constexpr(2**31 - 1)
SIGMOID = tl.constexpr(0)  # the places in reference.SCORES
SOFTMAX = tl.constexpr(1)
LOGITS_APART = tl.constexpr(2.0**-20)  # see needed_apart
SIGMOIDS_APART = tl.constexpr(2.0**-19)
LOGITS_RANGE = tl.constexpr(60.0)
LOG2_E = tl.constexpr(1.44269502162933349609375)  # and the rest of it
REST_OF_LOG2_E = tl.constexpr(1.925963033500511e-8)
LN_2 = tl.constexpr(0.6931471805599453)


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
    CANDIDATES: tl.constexpr,  # how many experts float32 may leave for the choice; 0: it leaves all of them
):
    """Grid: T."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    used = slot < top_k
    row = logits + token * experts
    largest, inverse, defined = 0.0, 0.0, 1.0
    if replayed is None or SCORE == SOFTMAX:
        size = experts // n_group
        group, member = tl.arange(0, GROUPS)[:, None], tl.arange(0, MEMBERS)[None, :]
        real = (group < n_group) & (member < size)
        expert = group * size + member
        logit = tl.load(row + expert, mask=real, other=float("-inf")).to(tl.float32)
        if SCORE == SOFTMAX:
            if NORMALIZE:
                defined = softmax_defined(logit)
            else:
                largest, _terms, inverse = narrow_softmax_sums(tl.reshape(logit, (GROUPS * MEMBERS,)))
        if replayed is None:
            chosen, known = slot * 0, False
            if CANDIDATES > 0:
                values = values_of_selection(logit, bias, expert, real, SCORE)
                keys = tl.where(real, key_of(values), NOT_ELIGIBLE)
                keys, lead = keep_best_groups(keys, n_group, topk_group, size, TWO_BEST)
                apart = needed_apart(bias, expert, real, SCORE)
                chosen, known = choose_by_values(
                    keys, apart, row, bias, expert, slot, top_k, SCORE, CANDIDATES
                )
                known = known & (lead > 2 * apart)  # of two sums of two values
            if known == 0:
                selection = logit
                if not BY_LOGITS:
                    selection = scores_of_tile(logit, SCORE)
                keys = tl.where(real, key_of(with_bias(selection, bias, expert, real)), NOT_ELIGIBLE)
                keys, _ = keep_best_groups(keys, n_group, topk_group, size, TWO_BEST)
                chosen = choose(keys, expert, slot, top_k)
    if replayed is not None:
        chosen = tl.load(replayed + token * top_k + slot, mask=used, other=-1)
    tl.store(indices + token * top_k + slot, chosen, mask=used)

    inside = used & (chosen >= 0) & (chosen < experts)
    logit = tl.load(row + chosen, mask=inside, other=float("-inf")).to(tl.float64)
    if SCORE == SOFTMAX and NORMALIZE:
        largest, inverse = softmax_sums(logit)
        weight = tl.exp(logit - largest) * inverse * defined
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
        every = tl.load(row + expert, mask=expert < experts, other=float("-inf")).to(tl.float32)
        largest, terms, inverse = narrow_softmax_sums(every)
        p = tl.where(inside, tl.exp(logit - largest) * inverse, 0.0)
        share = sum_of_chosen(grad, chosen, slot, expert, top_k) - tl.sum(grad * p, axis=0)
        share = scale * share * (terms * inverse)
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
def narrow_softmax_sums(logit):
    """The largest logit, e^(l - largest), and 1 / their sum, from float32 logits and exponentials of float32."""
    largest = tl.max(logit, axis=0)
    distance = logit - largest
    distance = tl.where(distance < -200.0, -200.0, distance)  # -inf too; NaN stays
    # e^d = 2^(h + r): what h loses, many equal terms would lose alike
    high = distance * LOG2_E
    rest = tl.fma(distance, LOG2_E, -high) + distance * REST_OF_LOG2_E
    terms = (tl.exp2(high) * (1.0 + rest * LN_2)).to(tl.float64)
    return largest.to(tl.float64), terms, 1.0 / tl.sum(terms, axis=0)


@triton.jit
def softmax_defined(logit):
    """NaN if a logit of a tile is NaN or +inf or all are -inf, else 1."""
    most = value_of(largest_of_tile(key_of(logit)))
    return tl.where(tl.abs(most) < float("inf"), 1.0, float("nan"))


@triton.jit
def scores_of_tile(logit, SCORE: tl.constexpr):
    """Of all experts."""
    wide, largest, inverse = logit.to(tl.float64), 0.0, 0.0
    if SCORE == SOFTMAX:
        largest, inverse = softmax_sums(tl.reshape(wide, (wide.numel,)))
    return score_of(wide, largest, inverse, SCORE)


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
def with_bias(score, bias, expert, real):
    """What experts are chosen by."""
    if bias is None:
        return score
    else:
        return score + tl.load(bias + expert, mask=real, other=0.0)


@triton.jit
def values_of_selection(logit, bias, expert, real, SCORE: tl.constexpr):
    """Values of float32 that stand for what experts are chosen by; in a softmax the logits, whose order is that of the scores."""
    if SCORE == SOFTMAX:
        return logit
    else:
        return with_bias(1.0 / (1.0 + tl.exp(-logit)), bias, expert, real)


@triton.jit
def needed_apart(bias, expert, real, SCORE: tl.constexpr):
    """How far apart two values of float32 must be for the scores to be in the same order.

    A softmax keeps the order of the logits: e^(l - l') is the ratio of two scores, so that logits 2^-20 apart have float32
    scores that differ, as long as these are no subnormals: e^-60 / E is none. A sigmoid in float32 is off by 2^-21 (a
    division by 2^-22, an exponential by as much), and with B the largest |bias| the sum p + bias is rounded by (1 + B) 2^-24,
    once in the value and once in the score.
    """
    if SCORE == SOFTMAX:
        return LOGITS_APART
    elif bias is None:
        return SIGMOIDS_APART
    else:
        return SIGMOIDS_APART * (1.0 + largest_of_tile(tl.abs(tl.load(bias + expert, mask=real, other=0.0))))


@triton.jit
def key_of(value):
    """Both zeros have one key."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN_KEY)


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keep_best_groups(keys, n_group, topk_group, size, TWO_BEST: tl.constexpr):
    """keys (GROUPS, MEMBERS), not eligible outside of the best groups, and by how much the last group kept leads the others.

    The key of a group is its best, or that of the sum of its two best selection scores. The lowest group wins among equals.
    """
    GROUPS: tl.constexpr = keys.shape[0]
    MEMBERS: tl.constexpr = keys.shape[1]
    if GROUPS == 1:
        return keys, float("inf")
    group, member = tl.arange(0, GROUPS), tl.arange(0, MEMBERS)[None, :]
    group_keys = tl.max(keys, axis=1)
    if TWO_BEST:
        place = tl.min(tl.where(keys == group_keys[:, None], member, MEMBERS), axis=1)
        second = tl.max(tl.where(member == place[:, None], NOT_ELIGIBLE, keys), axis=1)
        of_two = key_of(value_of(group_keys) + value_of(second))
        group_keys = tl.where((size > 1) & (group < n_group), of_two, group_keys)
    kept = group < 0
    following = tl.max(group_keys, axis=0)
    first, last = following, following
    for _ in range(topk_group):
        last = following
        best = tl.min(tl.where(group_keys == last, group, GROUPS), axis=0)
        kept = kept | (group == best)
        group_keys = tl.where(group == best, NOT_ELIGIBLE, group_keys)
        following = tl.max(group_keys, axis=0)
    lead = value_of(last) - value_of(following)
    lead = tl.where(value_of(first) - value_of(last) <= LOGITS_RANGE, lead, 0.0)
    lead = tl.where(following == NOT_ELIGIBLE, float("inf"), lead)
    return tl.where(kept[:, None], keys, NOT_ELIGIBLE), lead


@triton.jit
def largest_of_tile(values):
    return tl.max(tl.max(values, axis=1), axis=0)


@triton.jit
def first_of_tile(keys, key, expert):
    """The lowest expert that has the key."""
    return tl.min(tl.min(tl.where(keys == key, expert, NAN_KEY), axis=1), axis=0)


@triton.jit
def choose_by_values(
    keys, apart, row, bias, expert, slot, top_k, SCORE: tl.constexpr, CANDIDATES: tl.constexpr
):
    """The experts of the ``top_k`` largest scores in ``slot``, by the keys of values that stand for them, and whether these tell.

    Candidates are the experts with the K largest values and those that follow at less than ``apart``: all that could be among
    the K best. Where two of them follow each other too closely, the scores of the candidates make the order; in a softmax,
    whose scores need the sum over all, equal logits have equal scores, and other close ones tell nothing.
    """
    place, count = tl.arange(0, CANDIDATES), 0
    candidates, chosen = place * 0 - 1, slot * 0
    best = largest_of_tile(keys)
    previous, first, last = best, value_of(best), value_of(best)
    close = best == NOT_ELIGIBLE
    while (
        (count < CANDIDATES) & (best != NOT_ELIGIBLE) & ((count < top_k) | (value_of(best) >= last - apart))
    ):
        value, number = value_of(best), first_of_tile(keys, best, expert)
        near = (count > 0) & (value_of(previous) - value <= apart)
        if SCORE == SOFTMAX:
            near = near & (best != previous)
        close = close | near
        last = tl.where(count < top_k, value, last)
        candidates = tl.where(place == count, number, candidates)
        chosen = tl.where(slot == count, number, chosen)
        keys = tl.where(expert == number, NOT_ELIGIBLE, keys)
        previous = best
        best = largest_of_tile(keys)
        count += 1
    complete = (best == NOT_ELIGIBLE) | (value_of(best) < last - apart)
    known = complete & (tl.abs(first) < float("inf")) & (first - last <= LOGITS_RANGE)
    if SCORE == SOFTMAX:
        known = known & (close == 0)
    else:
        if known & close:
            real = candidates >= 0
            logit = tl.load(row + candidates, mask=real, other=float("-inf")).to(tl.float64)
            score = with_bias(score_of(logit, 0.0, 0.0, SCORE), bias, candidates, real)
            best_keys = tl.where(real, key_of(score), NOT_ELIGIBLE)
            chosen = choose(best_keys[None, :], candidates[None, :], slot, top_k)
    return chosen, known


@triton.jit
def choose(keys, expert, slot, top_k):
    """The experts of the ``top_k`` largest keys, in ``slot``; the lowest one among equals."""
    chosen = slot * 0
    for k in range(top_k):
        first = first_of_tile(keys, largest_of_tile(keys), expert)
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
