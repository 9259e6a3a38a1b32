// The forward of the log-prob rows on the CPU: sums over chunks of a row, and what follows from them.
//
// Notation: z logits of a row, T temperature, M = max z, d = (z - M) / T <= 0, sums over all v but one maximum,
//     S' = sum e^d        E' = sum e^d (-d)
//     logp = (z_y - M) / T - log1p(S')        entropy = log1p(S') + E' / (1 + S')
// No term cancels: logp <= 0 and entropy >= 0 by construction. Logits are read once from memory: a block of them is
// brought into the cache by the search for its maximum and summed from there.
#pragma once

#include "logprob/cpu_rows.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

template <typename T>
float largest_of(const T* z, int64_t count) {
    Floats most[4] = {all(-kInfinity), all(-kInfinity), all(-kInfinity), all(-kInfinity)};  // none waits for another
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        for (int j = 0; j < 4; ++j) most[j] = greater(load(z + i + j * kLanes), most[j]);  // NaN never wins
    }
    for (; i + kLanes <= count; i += kLanes) most[0] = greater(load(z + i), most[0]);
    if (i < count) most[0] = greater(load_some(z + i, count - i), most[0]);
    return largest(greater(greater(most[0], most[1]), greater(most[2], most[3])));
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
        sums.squares *= scale * scale;
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
    BlockSums<Entropy, Ties> block, other;  // neither waits for the other
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        __builtin_prefetch(z + i + kBlock);  // memory works on the next block while this one is summed
        if (sizeof(T) == 4) __builtin_prefetch(z + i + kLanes + kBlock);
        block.add(load(z + i), largest, inverse);
        other.add(load(z + i + kLanes), largest, inverse);
    }
    if (i + kLanes <= count) {
        block.add(load(z + i), largest, inverse);
        i += kLanes;
    }
    if (i < count) other.add(load_some(z + i, count - i), largest, inverse);
    sums.sum += sum(block.sum + other.sum);
    if (Ties) sums.ties += sum(block.ties + other.ties);
    if (Entropy) sums.weighted += sum(block.weighted + other.weighted);
}

// The sums of the extra statistics; most, the largest of the block, stands at the first of its places.
template <typename T>
void add_extra(LogitSums& sums, const T* z, int64_t column, int64_t count, float most, float inverse_temperature) {
    Floats squares = {}, total = {};
    int64_t i = 0;
    const auto add = [&](Floats value, Floats counted) {
        const Floats e = exp_negative((value - sums.largest) * inverse_temperature);
        squares += e * e;
        total += counted;
    };
    for (; i + kLanes <= count; i += kLanes) add(load(z + i), load(z + i));
    if (i < count) {
        float rest[kLanes] = {};  // 0 beyond the end: -inf there would count
        store_some(rest, load_some(z + i, count - i), count - i);
        add(load_some(z + i, count - i), load(rest));
    }
    sums.squares += sum(squares);
    sums.total += sum(total);
    if (most == sums.largest && sums.position < 0) {
        for (int64_t at = 0; at < count && sums.position < 0; ++at) {
            if (load_some(z + at, 1)[0] == most) sums.position = column + at;
        }
    }
}

template <bool Entropy, typename T>
void reduce_block(LogitSums& sums, const T* z, int64_t column, int64_t count, bool extra, double inverse_temperature) {
    const float most = largest_of(z, count), inverse = static_cast<float>(inverse_temperature);
    if (most == -kInfinity) {  // nothing to add, unless a NaN hides in it
        const bool nan = has_nan(z, count);
        if (nan) sums.sum = __builtin_nan("");
        sums.total += nan ? __builtin_nan("") : -kInfinity;
        return;
    }
    if (most > sums.largest) {
        raise_largest(sums, most, inverse_temperature);
        sums.position = -1;
    }
    if (most == sums.largest) {
        add_block<Entropy, true>(sums, z, count, inverse);
    } else {
        add_block<Entropy, false>(sums, z, count, inverse);
    }
    if (extra) add_extra(sums, z, column, count, most, inverse);
}

template <bool Entropy, typename T>
void reduce_items(const R1kernelsTokenLogprobs& call, bool extra, LogitSums* sums, int64_t begin, int64_t end) {
    const int64_t chunks = chunks_per_row(call.vocabulary);
    const bool plain = is_plain(call);
    for (int64_t item = begin; item < end; ++item) {
        const Row row = row_of(call, item / chunks);
        if (row.ignored) continue;
        const T* raw = logits_of<T>(call, row);
        const int64_t first = item % chunks * kChunk;
        const int64_t last = call.vocabulary - first < kChunk ? call.vocabulary : first + kChunk;
        LogitSums& chunk = sums[item];
        chunk = {-kInfinity, 0, 0, 0, 0, 0, -1};
        for (int64_t column = first; column < last; column += kBlock) {
            const int64_t count = last - column < kBlock ? last - column : kBlock;
            if (plain) {
                reduce_block<Entropy>(chunk, raw + column, column, count, extra, row.inverse_temperature);
            } else {
                float logits[kBlock];
                transform(call, raw, column, count, logits, nullptr);
                reduce_block<Entropy>(chunk, logits, column, count, extra, row.inverse_temperature);
            }
        }
    }
}

// The sums of a whole row from those of its chunks.
LogitSums merge(const LogitSums* sums, int64_t chunks, double inverse_temperature) {
    LogitSums row = sums[0];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        LogitSums other = sums[chunk];
        if (other.largest > row.largest) {
            raise_largest(row, other.largest, inverse_temperature);
            row.position = other.position;
        }
        if (row.largest > other.largest) raise_largest(other, row.largest, inverse_temperature);
        row.ties += other.ties;
        row.sum += other.sum;
        row.weighted += other.weighted;
        row.squares += other.squares;
        row.total += other.total;
    }
    return row;
}

// The outputs of one row that is not ignored.
template <typename T>
void finish_row(const R1kernelsTokenLogprobs& call, const Row& row, const LogitSums& sums, const LogprobOutputs& to) {
    const int64_t rows = call.batch * call.tokens, number = row.number;
    const bool whole = call.vocabulary == call.whole, empty = sums.largest == -kInfinity;
    const bool here = row.target >= 0 && row.target < call.vocabulary;
    const double chosen = here ? single(call, logits_of<T>(call, row), row.target).value[0] : __builtin_nan("");
    // -inf alone: no distribution, but a part of a vocabulary may well be such
    const double others = empty ? (whole ? __builtin_nan("") : sums.sum) : sums.sum + (sums.ties - 1);
    const double log_normaliser = ::log1p(others);
    to.logp[number] =
        static_cast<float>(whole ? (chosen - sums.largest) * row.inverse_temperature - log_normaliser : chosen);
    if (to.entropy) to.entropy[number] = static_cast<float>(log_normaliser + sums.weighted / (1 + others));
    to.stats[number] = sums.largest;
    to.stats[rows + number] = static_cast<float>(others);
    to.stats[2 * rows + number] = static_cast<float>(sums.weighted);
    if (to.extra) {
        to.extra[number] = static_cast<float>(::log(sums.squares) - 2 * log_normaliser);
        to.extra[rows + number] = static_cast<float>(sums.total * row.inverse_temperature / call.vocabulary);
        to.extra[2 * rows + number] = here && sums.position == row.target;
    }
}

template <typename T>
void finish_rows(const R1kernelsTokenLogprobs& call, const LogitSums* sums, const LogprobOutputs& to, int64_t begin,
                 int64_t end) {
    const int64_t rows = call.batch * call.tokens, chunks = chunks_per_row(call.vocabulary);
    for (int64_t number = begin; number < end; ++number) {
        const Row row = row_of(call, number);
        if (!row.ignored) {
            finish_row<T>(call, row, merge(sums + number * chunks, chunks, row.inverse_temperature), to);
            continue;
        }
        to.logp[number] = 0;
        if (to.entropy) to.entropy[number] = 0;
        for (int64_t i = 0; i < 3; ++i) {
            to.stats[i * rows + number] = 0;
            if (to.extra) to.extra[i * rows + number] = 0;
        }
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
