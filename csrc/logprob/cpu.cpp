// token_logprobs on the CPU, compiled once for each instruction set (see common/vector.h).
//
// Notation: z logits of a row, T temperature, M = max z, d = (z - M) / T <= 0, sums over all v but one maximum,
//     S' = sum e^d        E' = sum e^d (-d)
//     logp = (z_y - M) / T - log1p(S')        entropy = log1p(S') + E' / (1 + S')
// No term cancels: logp <= 0 and entropy >= 0 by construction. Logits are read once from memory: a block of them is
// brought into the cache by the search for its maximum and summed from there.
#include "logprob/cpu.h"

#include <cmath>

#include "common/vector.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int64_t kBlock = 2048;  // logits; a multiple of kLanes that stays in the first-level cache

struct Row {
    int64_t number, target;
    int64_t batch, token;
    double inverse_temperature;
    bool ignored;
};

Row row_of(const R1kernelsTokenLogprobs& call, int64_t number) {
    Row row;
    row.number = number;
    row.batch = number / call.tokens;
    row.token = number % call.tokens;
    row.target = call.targets[number];
    row.ignored = row.target == call.ignore_index;
    row.inverse_temperature = 1.0 / (call.temperatures ? call.temperatures[number] : call.temperature);
    return row;
}

template <typename T>
const T* logits_of(const R1kernelsTokenLogprobs& call, const Row& row) {
    return static_cast<const T*>(call.logits) + row.batch * call.batch_stride + row.token * call.token_stride;
}

float to_float(const float* from) { return *from; }
float to_float(const BFloat16* from) { return load_some(from, 1)[0]; }
float to_float(const Float16* from) { return load_some(from, 1)[0]; }

// --- forward ---

template <typename T>
float largest_of(const T* z, int64_t count) {
    Floats most = all(-kInfinity);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) most = greater(load(z + i), most);  // NaN never wins
    if (i < count) most = greater(load_some(z + i, count - i), most);
    return largest(most);
}

template <typename T>
bool has_nan(const T* z, int64_t count) {
    Ints found = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Floats value = load(z + i);
        found |= value != value;
    }
    if (i < count) {
        const Floats value = load_some(z + i, count - i);
        found |= value != value;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        if (found[lane]) return true;
    }
    return false;
}

// Make `largest` the new M: e^((z - M_old) / T) = e^((M_old - M_new) / T) e^((z - M_new) / T).
void raise_largest(LogitSums& sums, float largest, double inverse_temperature) {
    if (sums.largest != -kInfinity) {
        const double step = (static_cast<double>(largest) - sums.largest) * inverse_temperature;
        const double scale = ::exp(-step);
        const double total = sums.sum + sums.ties;
        sums.weighted = scale * (sums.weighted + step * total);
        sums.sum = scale * total;
        sums.ties = 0;
    }
    sums.largest = largest;
}

// One block's share of the sums relative to M. `Ties`: the block may hold logits equal to M.
template <bool Entropy, bool Ties>
struct BlockSums {
    Floats sum = {}, ties = {}, weighted = {};

    void add(Floats z, Floats largest, Floats inverse_temperature) {
        const Floats d = (z - largest) * inverse_temperature;
        const Floats e = exp_negative(d);
        const Floats below = Ties ? (d >= 0 ? Floats{} : e) : e;
        sum += below;
        if (Ties) ties += e - below;
        // where d is -inf, e is 0 and the bound on d makes their product 0
        if (Entropy) weighted -= e * greater(all(kSmallestExponent), d);
    }
};

template <bool Entropy, bool Ties, typename T>
void add_block(LogitSums& sums, const T* z, int64_t count, float inverse_temperature) {
    const Floats largest = all(sums.largest), inverse = all(inverse_temperature);
    BlockSums<Entropy, Ties> block;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        __builtin_prefetch(z + i + kBlock);  // memory works on the next block while this one is summed
        block.add(load(z + i), largest, inverse);
    }
    if (i < count) block.add(load_some(z + i, count - i), largest, inverse);
    sums.sum += sum(block.sum);
    if (Ties) sums.ties += sum(block.ties);
    if (Entropy) sums.weighted += sum(block.weighted);
}

template <bool Entropy, typename T>
LogitSums reduce_logits(const T* z, int64_t count, double inverse_temperature) {
    LogitSums sums = {-kInfinity, 0, 0, 0};
    const float inverse = static_cast<float>(inverse_temperature);
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t size = count - begin < kBlock ? count - begin : kBlock;
        const T* block = z + begin;
        const float most = largest_of(block, size);
        if (most == -kInfinity) {  // nothing to add, unless a NaN hides in it
            if (has_nan(block, size)) sums.sum = __builtin_nan("");
            continue;
        }
        if (most > sums.largest) raise_largest(sums, most, inverse_temperature);
        if (most == sums.largest) {
            add_block<Entropy, true>(sums, block, size, inverse);
        } else {
            add_block<Entropy, false>(sums, block, size, inverse);
        }
    }
    return sums;
}

template <bool Entropy, typename T>
void reduce_items(const R1kernelsTokenLogprobs& call, LogitSums* sums, int64_t begin, int64_t end) {
    const int64_t chunks = chunks_per_row(call.vocabulary);
    for (int64_t item = begin; item < end; ++item) {
        const Row row = row_of(call, item / chunks);
        if (row.ignored) continue;
        const int64_t first = item % chunks * kChunk;
        const int64_t count = call.vocabulary - first < kChunk ? call.vocabulary - first : kChunk;
        sums[item] = reduce_logits<Entropy>(logits_of<T>(call, row) + first, count, row.inverse_temperature);
    }
}

// The sums of a whole row from those of its chunks.
LogitSums merge(const LogitSums* sums, int64_t chunks, double inverse_temperature) {
    LogitSums row = sums[0];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        LogitSums other = sums[chunk];
        if (other.largest > row.largest) raise_largest(row, other.largest, inverse_temperature);
        if (row.largest > other.largest) raise_largest(other, row.largest, inverse_temperature);
        row.ties += other.ties;
        row.sum += other.sum;
        row.weighted += other.weighted;
    }
    return row;
}

template <typename T>
void finish_rows(const R1kernelsTokenLogprobs& call, const LogitSums* sums, float* logp, float* entropy, float* stats,
                 int64_t begin, int64_t end) {
    const int64_t rows = call.batch * call.tokens, chunks = chunks_per_row(call.vocabulary);
    for (int64_t number = begin; number < end; ++number) {
        const Row row = row_of(call, number);
        LogitSums total = {0, 1, 0, 0};
        double chosen = 0, spread = 0;
        if (!row.ignored) {
            total = merge(sums + number * chunks, chunks, row.inverse_temperature);
            if (total.largest == -kInfinity) total.sum = __builtin_nan("");  // all -inf: no distribution
            const double target = to_float(logits_of<T>(call, row) + row.target);
            chosen = (target - total.largest) * row.inverse_temperature;
        }
        const double others = total.sum + (total.ties - 1);
        const double log_normaliser = ::log1p(others);
        spread = total.weighted;
        logp[number] = static_cast<float>(chosen - log_normaliser);
        if (entropy) entropy[number] = static_cast<float>(log_normaliser + spread / (1 + others));
        stats[number] = total.largest;
        stats[rows + number] = static_cast<float>(others);
        stats[2 * rows + number] = static_cast<float>(spread);
    }
}

// --- backward ---
//
//     d z_v = 1/T [ g (1[v = y] - p_v) + h p_v ((M - z_v) / T - E' / (1 + S')) ]
// with p = e^d / (1 + S') and g, h the gradients of logp and entropy. 1 - p_y = -expm1(logp) keeps its digits where
// the target leads.

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

template <bool Entropy, typename T>
void backward_items(const R1kernelsTokenLogprobs& call, const float* logp, const float* stats, const float* grad_logp,
                    const float* grad_entropy, T* grad, int64_t grad_batch_stride, int64_t grad_token_stride,
                    int64_t begin, int64_t end) {
    const int64_t rows = call.batch * call.tokens, chunks = chunks_per_row(call.vocabulary);
    for (int64_t item = begin; item < end; ++item) {
        const Row row = row_of(call, item / chunks);
        const int64_t first = item % chunks * kChunk;
        const int64_t count = call.vocabulary - first < kChunk ? call.vocabulary - first : kChunk;
        T* to = grad + row.batch * grad_batch_stride + row.token * grad_token_stride + first;
        if (row.ignored) {
            memset(to, 0, count * sizeof(T));
            continue;
        }
        const T* z = logits_of<T>(call, row) + first;
        const double g = grad_logp ? grad_logp[row.number] : 0.0, h = Entropy ? grad_entropy[row.number] : 0.0;
        const double largest = stats[row.number], total = 1.0 + stats[rows + row.number];
        const double mean_spread = stats[2 * rows + row.number] / total, scale = row.inverse_temperature / total;
        const RowGradient constants = {static_cast<float>(largest), static_cast<float>(row.inverse_temperature),
                                       static_cast<float>(g * scale), static_cast<float>(h * scale),
                                       static_cast<float>(mean_spread)};

        const int64_t target = row.target - first;
        const bool here = target >= 0 && target < count;
        const double chosen = here ? to_float(z + target) : 0;  // before an in-place gradient overwrites it
        write_gradient<Entropy>(z, to, count, constants);
        if (here) {
            const double d = (chosen - largest) * row.inverse_temperature, p = ::exp(d) / total;
            double value = g * -::expm1(static_cast<double>(logp[row.number]));
            if (Entropy && p != 0) value += h * p * (-d - mean_spread);
            store_some(to + target, all(static_cast<float>(value * row.inverse_temperature)), 1);
        }
    }
}

// --- by dtype ---

void reduce(const R1kernelsTokenLogprobs& call, bool entropy, LogitSums* sums, int64_t begin, int64_t end) {
    switch (call.dtype) {
        case R1KERNELS_FLOAT32:
            return entropy ? reduce_items<true, float>(call, sums, begin, end)
                           : reduce_items<false, float>(call, sums, begin, end);
        case R1KERNELS_FLOAT16:
            return entropy ? reduce_items<true, Float16>(call, sums, begin, end)
                           : reduce_items<false, Float16>(call, sums, begin, end);
        default:
            return entropy ? reduce_items<true, BFloat16>(call, sums, begin, end)
                           : reduce_items<false, BFloat16>(call, sums, begin, end);
    }
}

void finish(const R1kernelsTokenLogprobs& call, const LogitSums* sums, float* logp, float* entropy, float* stats,
            int64_t begin, int64_t end) {
    switch (call.dtype) {
        case R1KERNELS_FLOAT32: return finish_rows<float>(call, sums, logp, entropy, stats, begin, end);
        case R1KERNELS_FLOAT16: return finish_rows<Float16>(call, sums, logp, entropy, stats, begin, end);
        default: return finish_rows<BFloat16>(call, sums, logp, entropy, stats, begin, end);
    }
}

template <typename T>
void backward_of(const R1kernelsTokenLogprobs& call, const float* logp, const float* stats, const float* grad_logp,
                 const float* grad_entropy, void* grad, int64_t batch_stride, int64_t token_stride, int64_t begin,
                 int64_t end) {
    const auto run = grad_entropy ? backward_items<true, T> : backward_items<false, T>;
    run(call, logp, stats, grad_logp, grad_entropy, static_cast<T*>(grad), batch_stride, token_stride, begin, end);
}

void backward(const R1kernelsTokenLogprobs& call, const float* logp, const float* stats, const float* grad_logp,
              const float* grad_entropy, void* grad, int64_t batch_stride, int64_t token_stride, int64_t begin,
              int64_t end) {
    const auto run = call.dtype == R1KERNELS_FLOAT32   ? backward_of<float>
                     : call.dtype == R1KERNELS_FLOAT16 ? backward_of<Float16>
                                                       : backward_of<BFloat16>;
    run(call, logp, stats, grad_logp, grad_entropy, grad, batch_stride, token_stride, begin, end);
}

}  // namespace

const LogprobKernels logprob_kernels = {reduce, finish, backward};

}  // namespace r1kernels::R1KERNELS_ISA
