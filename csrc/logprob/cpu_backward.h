// The backward of the log-prob rows on the CPU.
//
//     d z_v = 1/T [ g (1[v = y] - p_v) + h p_v ((M - z_v) / T - E' / (1 + S')) ]
// with p = e^d / (1 + S') and g, h the gradients of logp and entropy. 1 - p_y = -expm1(logp) keeps its digits where
// the target leads. The gradient of a raw logit is that of its logit times the slope (cpu_rows.h).
#pragma once

#include "logprob/cpu_rows.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

struct RowGradient {
    float largest, inverse_temperature;
    float from_logp, from_entropy;  // g and h over (1 + S') T
    float mean_spread;              // E' / (1 + S')
};

template <bool Entropy>
Floats gradient(Floats z, const RowGradient& row) {
    const Floats d = (z - row.largest) * row.inverse_temperature;
    const Floats e = exp_negative(d);
    if (!Entropy) return e * -row.from_logp;
    const Floats spread = -greater(all(kSmallestExponent), d) - row.mean_spread;
    return e * (spread * row.from_entropy - row.from_logp);
}

template <bool Entropy, typename T>
void write_gradient(const T* z, T* grad, int64_t count, const RowGradient& row) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(grad + i, gradient<Entropy>(load(z + i), row));
    if (i < count) store_some(grad + i, gradient<Entropy>(load_some(z + i, count - i), row), count - i);
}

// The same for logits that are not the raw ones: block by block through buffers.
template <bool Entropy, typename T>
void write_gradient_of_raw(const R1kernelsTokenLogprobs& call, const T* raw, T* grad, int64_t first, int64_t count,
                           const RowGradient& row) {
    float logits[kBlock], slopes[kBlock];
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t size = count - begin < kBlock ? count - begin : kBlock;
        transform(call, raw, first + begin, size, logits, slopes);
        T* to = grad + first + begin;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            store(to + i, gradient<Entropy>(load(logits + i), row) * load(slopes + i));
        }
        if (i < size) {
            const int some = static_cast<int>(size - i);
            store_some(to + i, gradient<Entropy>(load_some(logits + i, some), row) * load_some(slopes + i, some), some);
        }
    }
}

template <bool Entropy, typename T>
void backward_items(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobGradients& from, T* grad,
                    int64_t grad_batch_stride, int64_t grad_token_stride, int64_t begin, int64_t end) {
    const int64_t rows = call.batch * call.tokens, chunks = chunks_per_row(call.vocabulary);
    const bool plain = is_plain(call);
    for (int64_t item = begin; item < end; ++item) {
        const Row row = row_of(call, item / chunks);
        const int64_t first = item % chunks * kChunk;
        const int64_t count = call.vocabulary - first < kChunk ? call.vocabulary - first : kChunk;
        T* to = grad + row.batch * grad_batch_stride + row.token * grad_token_stride;
        if (row.ignored) {
            memset(to + first, 0, count * sizeof(T));
            continue;
        }
        const T* raw = logits_of<T>(call, row);
        const int64_t entry = from.sequences ? from.sequences[row.number] : row.number;
        const double g = from.grad_logp ? from.grad_logp[entry] : 0.0, h = Entropy ? from.grad_entropy[entry] : 0.0;
        const double largest = from.stats[row.number], total = 1.0 + from.stats[rows + row.number];
        const double mean_spread = from.stats[2 * rows + row.number] / total, scale = row.inverse_temperature / total;
        const RowGradient constants = {static_cast<float>(largest), static_cast<float>(row.inverse_temperature),
                                       static_cast<float>(g * scale), static_cast<float>(h * scale),
                                       static_cast<float>(mean_spread)};

        const bool here = row.target >= first && row.target < first + count;
        Logit chosen = {};  // before an in-place gradient overwrites it
        if (here) chosen = single(call, raw, row.target);
        if (plain) {
            write_gradient<Entropy>(raw + first, to + first, count, constants);
        } else {
            write_gradient_of_raw<Entropy>(call, raw, to, first, count, constants);
        }
        if (here) {
            const double d = (chosen.value[0] - largest) * row.inverse_temperature, p = ::exp(d) / total;
            double value = g * -::expm1(static_cast<double>(from.logp[row.number]));
            if (Entropy && p != 0) value += h * p * (-d - mean_spread);
            value *= row.inverse_temperature * chosen.slope[0];
            store_some(to + row.target, all(static_cast<float>(value)), 1);
        }
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
