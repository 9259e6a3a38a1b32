// The mathematics of grpo_loss, once for the CPU (F: a vector of floats) and for CUDA (F: float).
//
// x, o, r: log-prob under the policy, under the one that made the sample, under the reference; l = x - o; A: advantage;
// p: policy weight; w: weight in the loss; H: entropy, e: its weight; m: mask; n: counted tokens of the sequence.
// c is the importance ratio of the token or of its sequence. One pass over the tokens sums up what a sequence has in
// common (SequenceSums), sequence_of makes constants of it (Sequence), a second pass adds up the loss (LossSums) and
// writes the gradients, finish makes loss and metrics of the sums.
#pragma once

#include "grpo/layout.h"

namespace r1kernels::R1KERNELS_GRPO_SCOPE {

constexpr float kLargestLogRatio = 20.0f;           // output ratio, VESPO
constexpr float kLowestLogWeight = -18.420680744f;  // ln 1e-8, VESPO
constexpr float kHighestLogWeight = 20.0f;

template <class F>
R1KERNELS_TERM F same(float value) {
    return F{} + value;
}

// value, moved into [low, high]; NaN stays NaN
template <class F>
R1KERNELS_TERM F clamp(F value, F low, F high) {
    const F raised = value < low ? low : value;
    return raised > high ? high : raised;
}

// Whether neither policy can have made a token (x = o = -inf, or x alone where the policy itself made it): -inf minus -inf has
// no meaning, so the token has the difference 0 and the weight 0.
template <class F>
R1KERNELS_TERM auto is_impossible(const R1kernelsGrpo& call, F logp, F old_logp) {
    const F least = same<F>(-INFINITY);
    return (logp == least) & ((call.old_logp == nullptr ? least : old_logp) == least);
}

// One token, or a vector of them; what does not count is 0 (counted: false), so that no NaN or inf stands there.
template <class F, class Mask>
struct Token {
    Mask counted;     // by the mask, and possible
    Mask impossible;  // counted by the mask: in the weights of the others and in the length of its sequence
    F logp, log_ratio;  // x, l
    F drift;            // r - x, 0 without a reference
    F advantage;
    F policy_weight;  // 1 where none are given
    F weight;         // w; without weights: that of the sequence
    F entropy, entropy_weight;
};

// --- first pass: what the tokens of a sequence have in common ---

struct SequenceSums {
    float counted = 0;  // n
    float first = 0;    // sequence, output: sum l; gmpo: sum of bounded l; vespo: sum of clamped l
    float second = 0;   // output: sum x; gmpo: sum w p A (w = 1 without weights); vespo: sum of clamped log p
    float third = 0;    // output: sum (r - x)
};

// sgn(A) min(sgn(A) l, sgn(A) clamp(l, low, high)): l bounded from above for A > 0, from below for A < 0, 0 for A = 0.
template <class F>
R1KERNELS_TERM F bounded_log_ratio(F log_ratio, F advantage, F low, F high) {
    const F zero = {};
    const F from_above = log_ratio > high ? high : log_ratio, from_below = log_ratio < low ? low : log_ratio;
    return advantage > zero ? from_above : (advantage < zero ? from_below : zero);
}

// What a token adds to first, second and third.
template <class F, class Mask>
R1KERNELS_TERM void sequence_terms(const R1kernelsGrpo& call, const Token<F, Mask>& token, F& first, F& second,
                                   F& third) {
    const R1kernelsGrpoNumbers& number = call.numbers;
    const F zero = {};
    third = zero;
    if (call.variant == R1KERNELS_GMPO) {
        first = bounded_log_ratio(token.log_ratio, token.advantage, same<F>(number.low), same<F>(number.high));
        second = token.weight * token.policy_weight * token.advantage;
    } else if (call.variant == R1KERNELS_VESPO) {
        first = clamp(token.log_ratio, same<F>(-kLargestLogRatio), same<F>(kLargestLogRatio));
        second = zero;
        if (call.policy_weights != nullptr && call.policy_weights_per_token) {
            second = clamp(log_of(token.policy_weight), same<F>(kLowestLogWeight), same<F>(kHighestLogWeight));
        }
    } else {
        first = token.log_ratio;
        second = token.logp;
        third = token.drift;
    }
    second = token.counted ? second : zero;
}

// The constants of one sequence for the second pass.
struct Sequence {
    float counted;          // n
    float weight;           // w of its tokens, without weights
    float unit;             // what a token counts in the means over ratios: 1, or 1 / n
    float ratio;            // c of sequence and output
    float inside;           // output: 1 where D is not clamped, d c / d D = c; else 0
    float logp, drift;      // output: X = sum x, R - X
    float phi_positive, phi_negative;  // vespo: phi for A >= 0, A < 0
    float mean_ratio;       // gmpo: G
    float slope;            // gmpo: dL/dx of a token that is not clipped
};

// phi of VESPO: log phi = lam + k log w - lam w; 0 where that is not finite
R1KERNELS_TERM float vespo_phi(float k, float lam, float log_weight) {
    const float phi = exp_of(lam + k * log_weight - lam * exp_of(log_weight));
    return phi < INFINITY ? phi : 0.0f;
}

// `divisor`: of the weights, without the tokens of the sequence. `policy_weight`: that of the sequence, where it has one.
R1KERNELS_TERM Sequence sequence_of(const R1kernelsGrpo& call, const SequenceSums& sums, float divisor,
                                    float policy_weight) {
    const R1kernelsGrpoNumbers& number = call.numbers;
    const float n = sums.counted > 1.0f ? sums.counted : 1.0f;
    Sequence sequence = {};
    sequence.counted = sums.counted;
    sequence.weight = 1.0f / (call.count == R1KERNELS_COUNT_SEQUENCE ? divisor * n : divisor);
    sequence.unit = call.ratio == R1KERNELS_RATIO_TOKEN ? 1.0f : 1.0f / n;
    if (call.ratio == R1KERNELS_RATIO_SEQUENCE) {
        sequence.ratio = exp_of(sums.first / n);
    } else if (call.ratio == R1KERNELS_RATIO_OUTPUT) {
        sequence.ratio = exp_of(clamp(sums.first, -kLargestLogRatio, kLargestLogRatio));
        sequence.inside = sums.first >= -kLargestLogRatio && sums.first <= kLargestLogRatio ? 1.0f : 0.0f;
        sequence.logp = sums.second;
        sequence.drift = sums.third;
    } else if (call.variant == R1KERNELS_VESPO) {
        float log_weight = sums.first + sums.second;
        if (call.policy_weights != nullptr && !call.policy_weights_per_token) {
            log_weight += clamp(log_of(policy_weight), kLowestLogWeight, kHighestLogWeight);
        }
        log_weight = clamp(log_weight, kLowestLogWeight, kHighestLogWeight);
        sequence.phi_positive = vespo_phi(number.k_positive, number.lam_positive, log_weight);
        sequence.phi_negative = vespo_phi(number.k_negative, number.lam_negative, log_weight);
    } else if (call.variant == R1KERNELS_GMPO) {
        // L = -G sum_t w_t p_t A_t and dG/dx_u = G a_u / n
        sequence.mean_ratio = exp_of(sums.first / n);
        sequence.slope = -sequence.mean_ratio / n * sums.second;
        if (call.weights == nullptr) sequence.slope *= sequence.weight;
    }
    return sequence;
}

// --- second pass: loss, metrics and gradients ---

// A term and its derivatives: dl/dlog c = c dl/dc reaches x through the ratio, dl/dx is direct.
template <class F>
struct Term {
    F value = {}, by_ratio = {}, by_logp = {};
};

template <class F, class Mask>
R1KERNELS_TERM Term<F> policy_term(const R1kernelsGrpo& call, const Sequence& sequence, const Token<F, Mask>& token,
                                   F ratio, F logp) {
    const R1kernelsGrpoNumbers& number = call.numbers;
    const F zero = {}, A = token.advantage;
    Term<F> term;
    switch (call.variant) {
        case R1KERNELS_GRPO:
        case R1KERNELS_DUAL_CLIP: {
            const F delta = same<F>(number.delta);
            const F unclipped = (ratio > delta ? delta : ratio) * A;
            const F clipped = clamp(ratio, same<F>(number.low), same<F>(number.high)) * A;
            const auto lesser = unclipped <= clipped;
            term.value = -(lesser ? unclipped : clipped);
            // l = -min(c, delta) A where that is the lesser: dl/dlog c = -c A, up to delta
            term.by_ratio = lesser & (ratio <= delta) ? -ratio * A : zero;
            if (call.variant == R1KERNELS_DUAL_CLIP) {  // at most -bound A for A < 0, where it is constant
                const F bound = -number.dual_bound * A;
                const auto bounded = (A < zero) & (term.value > bound);
                term.value = bounded ? bound : term.value;
                term.by_ratio = bounded ? zero : term.by_ratio;
            }
            break;
        }
        case R1KERNELS_CISPO: {
            const F high = same<F>(number.high);
            // l = -sg(min(c, high)) A x: dl/dx = -min(c, high) A
            term.by_logp = -(ratio > high ? high : ratio) * A;
            term.value = term.by_logp * logp;
            break;
        }
        case R1KERNELS_SAPO: {
            const F tau = A > zero ? same<F>(number.tau_positive) : same<F>(number.tau_other);
            const F e = exp_of(-tau * (ratio - 1.0f));
            const F sigma = 1.0f / (1.0f + e), complement = e < same<F>(INFINITY) ? e * sigma : same<F>(1.0f);
            term.value = -A * sigma * 4.0f / tau;
            // d sigma(tau (c - 1)) / dc = tau sigma (1 - sigma)
            // (e is 0 where c is so large that sigma is 1: the product falls to 0 there, even for an infinite c)
            term.by_ratio = e == zero ? zero : -A * 4.0f * sigma * complement * ratio;
            break;
        }
        case R1KERNELS_VESPO:
            // l = -sg(phi) A x
            term.by_logp = -(A >= zero ? same<F>(sequence.phi_positive) : same<F>(sequence.phi_negative)) * A;
            term.value = term.by_logp * logp;
            break;
        case R1KERNELS_GMPO:
            term.value = -A * sequence.mean_ratio;  // its derivative is Sequence::slope
            break;
        default:
            // l = -A x
            term.by_logp = -A;
            term.value = term.by_logp * logp;
    }
    return term;
}

// Of a token (or, for the ratio of an output, of the whole output) with d = r - x.
template <class F>
R1KERNELS_TERM Term<F> kl_term(const R1kernelsGrpo& call, F d, F ratio) {
    const F zero = {};
    Term<F> term;
    if (call.kl == R1KERNELS_KL_K1) {
        term.value = -d;
        term.by_logp = same<F>(1.0f);
    } else if (call.kl == R1KERNELS_KL_ABS) {
        const F sign = d > zero ? same<F>(-1.0f) : (d < zero ? same<F>(1.0f) : zero);
        term.value = -d * sign;
        term.by_logp = sign;
    } else if (call.kl == R1KERNELS_KL_K2) {
        term.value = d * d * 0.5f;
        term.by_logp = -d;
    } else {
        // k3 = e^d - 1 - d: dk3/dx = 1 - e^d
        const F growth = expm1_of(d), k3 = growth - d;
        if (call.kl == R1KERNELS_KL_K3) {
            term.value = k3;
            term.by_logp = -growth;
        } else if (call.kl == R1KERNELS_KL_K3_PLUS) {
            term.value = k3;
            term.by_logp = -d;  // that of k2
        } else {
            // c k3: dc k3/dlog c = c k3, and c (1 - e^d) directly; where c is the token's own they add up to -c d
            const bool own = call.ratio == R1KERNELS_RATIO_TOKEN;
            term.value = ratio * k3;
            term.by_ratio = own ? zero : term.value;
            term.by_logp = -ratio * (own ? d : growth);
        }
    }
    return term;
}

// What the second pass adds up. Means over ratios and clips are in units (see Sequence::unit).
template <class F>
struct LossSums {
    F tokens = {}, impossible = {};    // counted; and those of the mask that are not
    F policy = {}, kl_loss = {}, bonus = {};  // sum w p l, sum w KL, sum e H
    F kl = {}, entropy = {}, log_ratio = {};
    F ratio = {}, clipped_low = {}, clipped_high = {};
    F of_ratio = {};                   // the gradient that reaches x through the ratio of the sequence
    F largest = {};                    // of the ratios c; and relative to it, so that no square overflows:
    F relative = {}, squares = {};     // sum c / largest, sum (c / largest)^2
    F units = {};
};

template <class F>
R1KERNELS_TERM F at_least_something(F largest) {
    const F zero = {};
    return largest > zero ? largest : same<F>(1.0f);
}

template <class F>
struct TokenGradient {
    F logp, entropy;
};

// Adds one token to the sums and returns its own gradients, for an upstream gradient of 1.
template <class F, class Mask>
R1KERNELS_TERM TokenGradient<F> add_token(const R1kernelsGrpo& call, const Sequence& sequence,
                                          const Token<F, Mask>& token, LossSums<F>& sums) {
    const R1kernelsGrpoNumbers& number = call.numbers;
    const F zero = {}, one = same<F>(1.0f);
    const auto counted = token.counted;
    const bool own = call.ratio == R1KERNELS_RATIO_TOKEN, whole = call.ratio == R1KERNELS_RATIO_OUTPUT;
    const auto of_sequence = counted | token.impossible;  // what a sequence has in common, all of its tokens have
    const F ratio = own ? exp_of(token.log_ratio) : same<F>(sequence.ratio);
    const F logp = whole ? same<F>(sequence.logp) : token.logp;
    const F weight = counted ? token.weight : zero;
    const F policy_weight = call.variant == R1KERNELS_VESPO ? weight : weight * token.policy_weight;
    TokenGradient<F> gradient = {zero, zero};

    const Term<F> policy = policy_term(call, sequence, token, ratio, logp);
    sums.policy += counted ? policy_weight * policy.value : zero;
    F through_ratio = policy_weight * policy.by_ratio, direct = policy_weight * policy.by_logp;
    if (whole) {
        through_ratio = through_ratio * sequence.inside + direct;
        direct = zero;
    }
    if (call.variant == R1KERNELS_GMPO) {
        const auto unclipped = token.advantage > zero ? token.log_ratio <= same<F>(number.high)
                                                 : (token.advantage < zero) & (token.log_ratio >= same<F>(number.low));
        direct = unclipped ? same<F>(sequence.slope) : zero;
    }

    if (call.ref_logp != nullptr) {
        const Term<F> kl = kl_term(call, whole ? same<F>(sequence.drift) : token.drift, ratio);
        sums.kl += (whole ? of_sequence : counted | counted) ? kl.value : zero;
        if (number.kl_coef != 0) {
            sums.kl_loss += counted ? weight * kl.value : zero;
            const F scale = weight * number.kl_coef;
            through_ratio += scale * (whole ? kl.by_logp : kl.by_ratio);
            if (!whole) direct += scale * kl.by_logp;
        }
    }
    if (own) {
        direct += through_ratio;
    } else {
        sums.of_ratio += counted ? through_ratio : zero;
    }
    gradient.logp = counted ? direct : zero;

    if (call.entropy != nullptr) {
        sums.entropy += token.entropy;
        if (number.entropy_coef != 0) {
            const F entropy_weight = call.entropy_weights == nullptr ? weight : token.entropy_weight;
            sums.bonus += entropy_weight * token.entropy;
            gradient.entropy = -number.entropy_coef * entropy_weight;
        }
    }

    sums.tokens += counted ? one : zero;
    sums.impossible += token.impossible ? one : zero;
    sums.log_ratio += token.log_ratio;
    const F seen = (own ? counted | counted : of_sequence) ? ratio : zero;
    sums.ratio += seen;
    const F largest = seen > sums.largest ? seen : sums.largest, scale = at_least_something(largest);
    const F shrink = sums.largest / scale, relative = seen / scale;
    sums.relative = sums.relative * shrink + relative;
    sums.squares = sums.squares * shrink * shrink + relative * relative;
    sums.largest = largest;

    const bool of_log = call.variant == R1KERNELS_GMPO;
    if (of_log || call.variant <= R1KERNELS_CISPO) {
        const F compared = of_log ? token.log_ratio : ratio;
        // what does not count has no advantage
        const auto high = (token.advantage > zero) & (compared > same<F>(number.high));
        const auto low = (token.advantage < zero) & (compared < same<F>(number.low));
        sums.clipped_high += high ? one : zero;
        if (call.variant != R1KERNELS_CISPO) sums.clipped_low += low ? one : zero;
    }
    return gradient;
}

// `G` may be narrower than F.
template <class F, class G>
R1KERNELS_TERM LossSums<F> merge(LossSums<F> a, const LossSums<G>& b) {
    const F other = static_cast<F>(b.largest), largest = other > a.largest ? other : a.largest;
    const F scale = at_least_something(largest), from_a = a.largest / scale, from_b = other / scale;
    a.relative = a.relative * from_a + b.relative * from_b;
    a.squares = a.squares * from_a * from_a + b.squares * from_b * from_b;
    a.largest = largest;
    a.tokens += b.tokens;
    a.impossible += b.impossible;
    a.policy += b.policy;
    a.kl_loss += b.kl_loss;
    a.bonus += b.bonus;
    a.kl += b.kl;
    a.entropy += b.entropy;
    a.log_ratio += b.log_ratio;
    a.ratio += b.ratio;
    a.clipped_low += b.clipped_low;
    a.clipped_high += b.clipped_high;
    a.of_ratio += b.of_ratio;
    a.units += b.units;
    return a;
}

// The sums of one item, with the means over ratios and clips in units. `first`: the item begins its sequence.
R1KERNELS_TERM void to_units(const R1kernelsGrpo& call, const Sequence& sequence, bool first, LossSums<float>& sums) {
    sums.units = call.ratio == R1KERNELS_RATIO_TOKEN ? sums.tokens : (first && sequence.counted > 0 ? 1.0f : 0.0f);
    sums.ratio *= sequence.unit;
    sums.clipped_low *= sequence.unit;
    sums.clipped_high *= sequence.unit;
    sums.relative *= sequence.unit;
    sums.squares *= sequence.unit;
    if (call.ratio == R1KERNELS_RATIO_OUTPUT) sums.kl *= sequence.unit;
}

// grad_of_ratio of a sequence: d log s / dx_u = m_u / n, d log c / dx_u = m_u for the ratio of an output.
R1KERNELS_TERM float shared_gradient(const R1kernelsGrpo& call, float counted, double of_ratio) {
    const double n = call.ratio == R1KERNELS_RATIO_SEQUENCE && counted > 1 ? counted : 1.0;
    return static_cast<float>(of_ratio / n);
}

R1KERNELS_TERM double mean(double sum, double count) { return count > 0 ? sum / count : 0.0; }

// Loss and metrics (metrics.NAMES) of the sums of all items.
R1KERNELS_TERM void finish(const R1kernelsGrpo& call, const LossSums<double>& sums) {
    const double kl_coef = call.numbers.kl_coef, entropy_coef = call.numbers.entropy_coef;
    double loss = sums.policy;
    if (kl_coef != 0) loss += kl_coef * sums.kl_loss;
    if (entropy_coef != 0) loss -= entropy_coef * sums.bonus;
    const double metrics[] = {
        loss,
        sums.policy,
        mean(sums.kl, call.ratio == R1KERNELS_RATIO_OUTPUT ? sums.units : sums.tokens),
        mean(sums.entropy, sums.tokens),
        mean(sums.ratio, sums.units),
        sums.ratio == sums.ratio ? sums.largest : sums.ratio,  // a comparison loses NaN, a sum keeps it
        mean(sums.clipped_low, sums.units),
        mean(sums.clipped_high, sums.units),
        mean(sums.clipped_low + sums.clipped_high, sums.units),  // no token is in both
        mean(0.0 - sums.log_ratio, sums.tokens),
        sums.squares == 0 ? 0.0 : sums.relative * sums.relative / (sums.squares * sums.units),
        sums.tokens,
        sums.impossible,
    };
    *call.loss = static_cast<float>(loss);
    for (int i = 0; i < 13; ++i) call.metrics[i] = static_cast<float>(metrics[i]);
}

}  // namespace r1kernels::R1KERNELS_GRPO_SCOPE
