// What one id of the vocabulary adds to a divergence of teacher and student, and its slope, once for the CPU (F: a vector of
// floats) and for CUDA (F: float).
//
// The mathematics is that of r1kernels/logprob/divergence_terms.py, where P, t, h, w, phi and kappa are explained: no term is
// negative, none cancels. Log-probs at -inf are welcome; NaN stays NaN.
#pragma once

#include "logprob/call.h"

// The namespace of the functions that the kernels of the CPU (one for each instruction set) and of CUDA share.
#if defined(R1KERNELS_ISA)
#define R1KERNELS_TERM inline
#define R1KERNELS_LOGPROB_SCOPE R1KERNELS_ISA
#else
#define R1KERNELS_TERM __device__ inline
#define R1KERNELS_LOGPROB_SCOPE logprob
#endif

namespace r1kernels::R1KERNELS_LOGPROB_SCOPE {

// coefficients[0] + coefficients[1] x + ...
template <class F, int kCount>
R1KERNELS_TERM F polynomial(const float (&coefficients)[kCount], F x) {
    F result = F{} + coefficients[kCount - 1];
    for (int i = kCount - 2; i >= 0; --i) result = result * x + coefficients[i];
    return result;
}

// P, t and h of one id.
template <class F>
struct Pair {
    using Mask = decltype(F{} >= F{});

    Mask teacher_leads;
    F larger, distance, shrink;

    R1KERNELS_TERM Pair(F log_student, F log_teacher) {
        const F zero = {};
        teacher_leads = log_teacher >= log_student;
        const F log_larger = teacher_leads ? log_teacher : log_student, gap = log_teacher - log_student;
        larger = exp_of(log_larger);
        distance = log_teacher == log_student ? zero : (teacher_leads ? gap : -gap);
        shrink = expm1_of(-distance);
    }

    // phi(t)
    R1KERNELS_TERM F phi() const {
        // 1 / (n + 2)!
        const float series[] = {0x1p-1f, 0x1.555556p-3f, 0x1.555556p-5f, 0x1.111112p-7f, 0x1.6c16c2p-10f,
                                0x1.a01a02p-13f, 0x1.a01a02p-16f, 0x1.71de3ap-19f, 0x1.27e4fcp-22f};
        return distance < 1.0f ? distance * distance * polynomial(series, -distance) : distance + shrink;
    }

    // kappa(h), where log(1 + h) = -t is known
    R1KERNELS_TERM F kappa(F phi) const {
        const F zero = {};
        const F far = -shrink - (shrink == -1.0f ? zero : (1.0f + shrink) * distance);
        return distance < 1.0f ? -phi - shrink * distance : far;
    }

    // w: the share of the smaller one in the mixture
    R1KERNELS_TERM F share_of_smaller(float beta) const {
        const F student = F{} + (1.0f - beta), teacher = F{} + beta;
        return teacher_leads ? student : teacher;
    }
};

// log(1 + x) and kappa(x) for x in (-1, 0]: with s = x / (2 + x), log(1 + x) = 2 atanh(s) and atanh(s) = s + s^3 q.
template <class F>
struct Shrunk {
    F log, kappa;

    R1KERNELS_TERM explicit Shrunk(F x) {
        const float series[] = {0x1.555556p-2f, 0x1.99999ap-3f, 0x1.24924ap-3f,
                                0x1.c71c72p-4f, 0x1.745d18p-4f, 0x1.3b13b2p-4f};  // 1 / (2 n + 3)
        const F s = x / (2.0f + x), squared = s * s, q = polynomial(series, squared);
        log = 2.0f * (s + s * squared * q);
        kappa = 2.0f * squared * (1.0f + (1.0f + s) * s * q) / (1.0f - s);
        const auto far = x < -0.5f;
        if (any(far)) {
            const F rest = 1.0f + x, log_far = log_of(rest);
            log = far ? log_far : log;
            kappa = far ? rest * log_far - x : kappa;
        }
    }
};

// r = log(p_S / p_T), for JSD log(p_S / m).
template <class F>
R1KERNELS_TERM F log_ratio_to_mixture(const Pair<F>& pair, F log_mixture) {
    const F zero = {};
    return (pair.teacher_leads ? -pair.distance : zero) - log_mixture;
}

// What is summed over the ids of a row: the divergence and, but for the forward KL, what makes the mean of r under p_S. That
// is close to the r of a leading id, which is therefore summed apart.
template <class F>
struct DivergenceSums {
    F divergence, weighted;  // sum of p_S r over all but the largest
    F at_largest, largest;   // sum of r over those as large as the largest, and how many they are
};

template <int kKind, class F>
R1KERNELS_TERM DivergenceSums<F> divergence_terms(F log_student, F log_teacher, F log_largest, float beta) {
    const F zero = {}, one = zero + 1.0f;
    const Pair<F> pair = kKind == R1KERNELS_REVERSE_KL ? Pair<F>(log_teacher, log_student)
                                                       : Pair<F>(log_student, log_teacher);
    const F phi = pair.phi(), kappa = pair.kappa(phi);
    F found = pair.teacher_leads ? phi : kappa, ratio = log_student - log_teacher;
    if constexpr (kKind == R1KERNELS_JSD) {
        const F w = pair.share_of_smaller(beta);
        const Shrunk<F> mixture(w * pair.shrink);  // log(m / P), kappa(w h)
        found = w * kappa - mixture.kappa;
        ratio = log_ratio_to_mixture(pair, mixture.log);
    }
    found = pair.larger == 0.0f ? zero : pair.larger * found;
    if constexpr (kKind == R1KERNELS_FORWARD_KL) return {found, zero, zero, zero};
    const F student = exp_of(log_student);
    const auto is_largest = log_student == log_largest;
    return {found, (is_largest | (student == 0.0f)) ? zero : student * ratio, is_largest ? ratio : zero,
            is_largest ? one : zero};
}

// d divergence / d x_v of the student's scaled logits. mean_r: the mean of r under p_S, as the r of the largest and what it
// is above that.
template <int kKind, class F>
R1KERNELS_TERM F divergence_slope(F log_student, F log_teacher, float beta, F at_largest, F above) {
    const F zero = {};
    if constexpr (kKind == R1KERNELS_FORWARD_KL) {
        // p_S - p_T
        const Pair<F> pair(log_student, log_teacher);
        const F difference = pair.larger * pair.shrink;
        return pair.teacher_leads ? difference : -difference;
    }
    F student = exp_of(log_student), ratio = log_student - log_teacher;
    if constexpr (kKind == R1KERNELS_JSD) {
        const Pair<F> pair(log_student, log_teacher);
        ratio = log_ratio_to_mixture(pair, Shrunk<F>(pair.share_of_smaller(beta) * pair.shrink).log);
        student = student * (1.0f - beta);
    }
    // p_S (r - mean_r), for JSD times 1 - beta
    return student == 0.0f ? zero : student * (ratio - at_largest - above);
}

}  // namespace r1kernels::R1KERNELS_LOGPROB_SCOPE
