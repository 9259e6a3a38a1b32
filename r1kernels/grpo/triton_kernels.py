"""The other kernels of grpo_loss in Triton: from the sums of triton_sums.py to the loss, the metrics and the gradients.

Imports Triton: import this module only where a kernel is launched. B sequences, T tokens of the longest (padded), N tokens
in all. No program waits for another, and every sum has a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own types)

import triton
import triton.language as tl

from .metrics import NAMES
from .triton_sums import LARGEST, RATIO, SIZES, SQUARES, sums_of, weight_of_all
from .triton_terms import (
    first_slot_of,
    held_factor,
    k3_of,
    kl_term,
    load,
    load_either,
    log_of_weight,
    log_ratio_of,
    place_of,
    possible_of,
    product,
    quotient,
    ratio_of_sequence,
    sequence_term,
    token_term,
)

PLACES = {name: place for place, name in enumerate(NAMES)}  # of the metrics


@triton.jit
def with_weight_of_sequence(inner, given, sequence, count, CALL: tl.constexpr):
    """INNER with VESPO's policy weight where that is one per sequence."""
    if CALL.variant == "vespo" and CALL.sequence_weights:
        inner += log_of_weight(load(given.policy_weights, sequence, count > 0.0))
    return inner


@triton.jit
def merged(largest, ratios, squares, other_largest, other_ratios, other_squares):
    """Sums of c / max c and of its square over two sets of ratios, relative to the larger maximum."""
    top = tl.maximum(largest, other_largest)
    ours, theirs = quotient(largest, top), quotient(other_largest, top)
    return (
        top,
        ratios * ours + other_ratios * theirs,
        squares * ours * ours + other_squares * theirs * theirs,
    )


@triton.jit
def store_loss(sums, given, numbers, out, total_given, length, sequences, slots, CALL: tl.constexpr):
    """The loss, the metrics and grad_of_ratio from the sums of all slots."""
    common = weight_of_all(sums, numbers, total_given, given.cu_seqlens, sequences, slots, CALL)
    SEQUENCES: tl.constexpr = CALL.sequences
    zero = tl.zeros((SEQUENCES,), tl.float32)
    policy_loss, kl_loss, bonus = zero, zero, zero
    tokens, units, kl_units, impossibles = zero, zero, zero, zero
    drifts, kls, entropies, lows, highs = zero, zero, zero, zero, zero
    largest, ratios, squares = zero, zero, zero
    for start in range(0, sequences, SEQUENCES):
        sequence = start + tl.arange(0, SEQUENCES)
        first = first_slot_of(tl.minimum(sequence, sequences), given.cu_seqlens, length, CALL)
        end = first_slot_of(tl.minimum(sequence + 1, sequences), given.cu_seqlens, length, CALL)
        count, drift, gain, loss, kl_value, kl, bonus_value, entropy, low, high, inner, impossible = sums_of(
            sums, slots, first, end, CALL.slots
        )
        possible = count - impossible
        size = tl.maximum(count, 1.0)
        present = tl.where(count > 0.0, 1.0, 0.0)
        # a total of 0, which only a step without counted tokens has, makes the factor infinite
        weight = tl.where(count > 0.0, zero + common, 0.0)
        if CALL.counted == "sequence":
            weight /= size

        c = present
        if CALL.ratio == "token":
            units += possible
        else:
            c = ratio_of_sequence(drift, size, CALL)
            units += present
            low, high = (
                tl.where(c < numbers.low, low / size, 0.0),
                tl.where(c > numbers.high, high / size, 0.0),
            )
            largest, ratios, squares = merged(largest, ratios, squares, c * present, present, present)
        share = zero
        if CALL.token_terms:
            policy_loss += weight * gain
        else:
            inner = with_weight_of_sequence(inner, given, sequence, count, CALL)
            value, share = sequence_term(c, size, drift, gain, loss, inner, numbers, CALL)
            policy_loss += weight * value
        if given.ref_logp is not None:
            if CALL.ratio == "output":
                # d k3/dx = 1 - e^d
                k3 = k3_of(kl)
                share -= product(numbers.kl_coef, (k3 + kl) * kl_value)
                kl, kl_value = k3, k3 * kl_value
                kl_units += present
            else:
                kl_units += possible
                if CALL.ratio == "sequence" and CALL.kl == "unbiased":
                    # k3 dc/dx = k3 c / sum m
                    kl, kl_value = c * kl, c * kl_value
                    share += product(numbers.kl_coef, kl_value / size)
            kls += kl
            kl_loss += weight * kl_value
        if given.entropy is not None:
            if given.entropy_weights is None:
                bonus_value *= weight
            bonus += bonus_value
            entropies += entropy
        tokens += possible
        impossibles += impossible
        drifts += drift
        lows += low
        highs += high
        if out.grad_of_ratio is not None:
            tl.store(out.grad_of_ratio + sequence, weight * share, mask=sequence < sequences)

    if CALL.ratio == "token":
        MANY: tl.constexpr = CALL.many
        top, ratio_sum, square_sum = of_token_ratios(sums, slots, tl.zeros((MANY,), tl.float32))
    else:
        top, ratio_sum, square_sum = collected(largest, ratios, squares)

    policy, unit_sum, token_sum = (
        tl.sum(policy_loss, axis=0),
        tl.sum(units, axis=0),
        tl.sum(tokens, axis=0),
    )
    whole = policy
    kl_mean, entropy_mean, low_mean, high_mean = 0.0, 0.0, 0.0, 0.0
    if given.ref_logp is not None:
        whole += product(numbers.kl_coef, tl.sum(kl_loss, axis=0))
        kl_mean = quotient(tl.sum(kls, axis=0), tl.sum(kl_units, axis=0))
    if given.entropy is not None:
        whole -= product(numbers.entropy_coef, tl.sum(bonus, axis=0))
        entropy_mean = quotient(tl.sum(entropies, axis=0), token_sum)
    if CALL.clips:
        low_mean, high_mean = (
            quotient(tl.sum(lows, axis=0), unit_sum),
            quotient(tl.sum(highs, axis=0), unit_sum),
        )
    tl.store(out.loss, whole)
    store_metric(out, "loss", whole)
    store_metric(out, "policy_loss", policy)
    store_metric(out, "kl", kl_mean)
    store_metric(out, "entropy", entropy_mean)
    store_metric(out, "ratio/mean", quotient(ratio_sum * top, unit_sum))
    store_metric(out, "ratio/max", tl.where(ratio_sum == ratio_sum, top, ratio_sum))
    store_metric(out, "clip_ratio/low_mean", low_mean)
    store_metric(out, "clip_ratio/high_mean", high_mean)
    store_metric(out, "clip_ratio/region_mean", low_mean + high_mean)
    store_metric(out, "approx_kl", quotient(-tl.sum(drifts, axis=0), token_sum))
    share = quotient(ratio_sum * ratio_sum, square_sum * unit_sum)
    store_metric(out, "ess", tl.where(top < float("inf"), share, float("nan")))
    store_metric(out, "num_tokens", token_sum)
    store_metric(out, "num_impossible", tl.sum(impossibles, axis=0))


@triton.constexpr_function
def place_of_metric(name):
    return PLACES[name]


@triton.jit
def store_metric(out, NAME: tl.constexpr, value):
    tl.store(out.metrics + place_of_metric(NAME), value)


@triton.jit
def of_token_ratios(sums, slots, zero):
    """max c, and the sums of c / max c and of its square, over all slots; ``zero``: as many zeros as are read at a time."""
    largest, ratios, squares = zero, zero, zero
    for start in range(0, slots, zero.shape[0]):
        at = start + tl.arange(0, zero.shape[0])
        largest, ratios, squares = merged(
            largest,
            ratios,
            squares,
            load(sums + LARGEST * slots, at, at < slots),
            load(sums + RATIO * slots, at, at < slots),
            load(sums + SQUARES * slots, at, at < slots),
        )
    return collected(largest, ratios, squares)


@triton.jit
def collected(largest, ratios, squares):
    top = tl.max(largest, axis=0)
    relative = quotient(largest, top)
    return top, tl.sum(ratios * relative, axis=0), tl.sum(squares * relative * relative, axis=0)


@triton.jit
def store_gradients(
    slot, sums, given, numbers, out, total_given, tokens, length, sequences, slots, CALL: tl.constexpr
):
    """dL/dx (but for grad_of_ratio) and dL/dH of the tokens of a slot."""
    sequence, at, inside, owned = place_of(slot, tokens, given.cu_seqlens, length, sequences, CALL)
    counted, x = possible_of(given, at, tl.load(given.mask + at, mask=inside, other=0) != 0)
    one = tl.where(counted, 1.0, 0.0)
    this = sequence + tl.arange(0, 1)
    first = first_slot_of(this, given.cu_seqlens, length, CALL)
    end = first_slot_of(this + 1, given.cu_seqlens, length, CALL)
    count, drift, gain, loss, _, _, _, _, _, _, inner, _ = sums_of(
        sums, slots, first, end, 2 * CALL.sequences
    )
    size = tl.maximum(count, 1.0)
    common = weight_of_all(sums, numbers, total_given, given.cu_seqlens, sequences, slots, CALL)
    if CALL.counted == "sequence":
        common /= size
    weight = tl.where(counted, common, 0.0)
    if given.weights is not None:
        weight = load(given.weights, at, counted)

    if out.grad_logp is not None:
        log_ratio = log_ratio_of(given.old_logp, x, at, counted)
        advantage = load_either(given.advantages, sequence, at, counted, CALL.sequence_advantages)
        weighted = weight
        if given.policy_weights is not None and CALL.variant != "vespo":
            weighted *= load_either(given.policy_weights, sequence, at, counted, CALL.sequence_weights)
        c = tl.exp(log_ratio)
        if CALL.ratio != "token":
            c = ratio_of_sequence(drift, size, CALL) * one
        grad = tl.zeros_like(one)
        if CALL.token_terms:
            _, slope = token_term(c, advantage, x, numbers, CALL)
            grad = weighted * slope
        elif CALL.variant == "cispo" and CALL.ratio == "sequence":
            grad = -weighted * advantage * held_factor(c, c, True, numbers, CALL)
        elif CALL.variant == "vespo":
            inner = with_weight_of_sequence(inner, given, this, count, CALL)
            grad = -weighted * advantage * held_factor(c, inner, advantage >= 0.0, numbers, CALL)
        elif CALL.variant == "gmpo":
            _, share = sequence_term(c, size, drift, gain, loss, inner, numbers, CALL)
            clipped = ((advantage > 0.0) & (log_ratio > numbers.high)) | (
                (advantage < 0.0) & (log_ratio < numbers.low)
            )
            grad = tl.where(clipped | (advantage == 0.0), 0.0, common * share)
        if given.ref_logp is not None and CALL.ratio != "output":
            _, slope = kl_term(load(given.ref_logp, at, counted) - x, c, CALL)
            if CALL.ratio == "sequence" and CALL.kl == "unbiased":
                slope *= c
            grad += product(numbers.kl_coef, weight * slope)
        tl.store(out.grad_logp + at, tl.where(counted, grad, 0.0), mask=owned)

    if out.grad_entropy is not None:
        if given.entropy_weights is not None:
            weight = load(given.entropy_weights, at, counted)
        tl.store(out.grad_entropy + at, -numbers.entropy_coef * weight, mask=owned)


@triton.jit(do_not_specialize=SIZES)
def loss_kernel(
    sums,  # (NUM_SUMS, slots) float32
    given,  # loss.Tokens
    numbers,  # objective.Numbers
    out,  # loss.Results, whose gradients are None where they are not wanted
    total_given,  # (1,) float32 or None
    tokens: tl.int64,
    length: tl.int64,
    sequences: tl.int64,
    slots: tl.int64,
    CALL: tl.constexpr,
):
    """Grid: 1, for the loss, and one more for each slot where gradients are wanted."""
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        store_loss(sums, given, numbers, out, total_given, length, sequences, slots, CALL)
    else:
        store_gradients(
            program - 1, sums, given, numbers, out, total_given, tokens, length, sequences, slots, CALL
        )


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_loss,  # () float32
    grad_logp,  # what the forward wrote, or None
    grad_of_ratio,  # or None
    grad_entropy,  # or None
    mask,
    cu_seqlens,
    logp,  # or None
    scaled_grad_logp,
    scaled_grad_entropy,
    tokens: tl.int64,
    length: tl.int64,
    sequences: tl.int64,
    CALL: tl.constexpr,
):
    """The gradients times the one that comes from above. Grid: slots."""
    slot = tl.program_id(0).to(tl.int64)
    sequence, at, inside, owned = place_of(slot, tokens, cu_seqlens, length, sequences, CALL)
    upstream = tl.load(grad_loss)
    if grad_logp is not None:
        grad = load(grad_logp, at, owned)
        if grad_of_ratio is not None:
            in_ratio = tl.load(mask + at, mask=inside, other=0) != 0
            if logp is not None:
                in_ratio &= load(logp, at, inside) != -float("inf")
            grad += tl.where(in_ratio, tl.load(grad_of_ratio + sequence), 0.0)
        tl.store(scaled_grad_logp + at, upstream * grad, mask=owned)
    if grad_entropy is not None:
        tl.store(scaled_grad_entropy + at, upstream * load(grad_entropy, at, owned), mask=owned)
