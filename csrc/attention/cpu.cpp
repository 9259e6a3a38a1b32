// decode_attention on the CPU, compiled once for each instruction set (see common/vector.h).
#include "attention/cpu.h"

#include "common/vector_math.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int kColumns = 4;  // vectors of a value that are summed at a time

template <typename T>
T* at(const Vectors& vectors, int64_t i, int64_t j, int64_t k = 0) {
    return reinterpret_cast<T*>(vectors.data + i * vectors.strides[0] + j * vectors.strides[1] + k * vectors.strides[2]);
}

// `count` <= kLanes elements, and 0 behind them
template <typename T>
Floats load_first(const T* from, int64_t count) {
    if (count == kLanes) return load(from);
    Floats value = load_some(from, static_cast<int>(count));
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = lane < count ? value[lane] : 0.0f;
    return value;
}

// Lane i of the result is the sum over the lanes of sums[i], in the same order for each.
template <int kSize = kLanes / 2>
inline Floats sum_each(Floats (&sums)[kLanes]) {
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) {
        sums[i] = choose_lanes(sums[i], sums[i + kSize], lower_blocks<kSize>()) +
                  choose_lanes(sums[i], sums[i + kSize], upper_blocks<kSize>());
    }
    if constexpr (kSize == 1) {
        return sums[0];
    } else {
        return sum_each<kSize / 2>(sums);
    }
}

// <query, key> of `count` <= kLanes keys, which lie `stride` elements apart; the last one stands for those that are missing.
// kRest: `size` is no multiple of kLanes.
template <bool kRest, typename T>
inline Floats scores_of(const float* query, const T* keys, int64_t stride, int64_t count, int64_t size) {
    Floats sums[kLanes] = {};
    for (int64_t d = 0; d < size; d += kLanes) {
        const Floats q = load(query + d);
        const T* key = keys + d;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            sums[i] += q * (kRest && size - d < kLanes ? load_first(key, size - d) : load(key));
            key += i + 1 < count ? stride : 0;
        }
    }
    return sum_each(sums);
}

// cap tanh(x / cap), by tanh y = -e / (2 + e) with e = e^(-2 y) - 1 for y >= 0
Floats capped(Floats x, float cap) {
    const Floats y = x / cap;
    const Floats e = expm1_of(-2.0f * greater(y, -y));
    const Floats tanh = -e / (2.0f + e);
    return cap * (y < 0.0f ? -tanh : tanh);
}

// Tokens of one level that a row sees: keys and values of the first one, and how far the next ones are.
template <typename T>
struct Span {
    const T *keys, *values;
    int64_t key_stride, value_stride, count;
};

// sum_t weights[t] values[t] / total of kVectors vectors of columns, over the tokens of the spans in turn.
// rest: how many columns the last vector has.
template <int kVectors, typename T>
void weigh(const Span<T>* spans, int64_t span_count, const float* weights, float total, T* out, int64_t column, int rest) {
    Floats sums[kVectors] = {};
    for (int64_t s = 0; s < span_count; ++s) {
        const T* value = spans[s].values + column;
        for (int64_t t = 0; t < spans[s].count; ++t, value += spans[s].value_stride) {
            const Floats weight = all(*weights++);
#pragma GCC unroll 8
            for (int c = 0; c < kVectors; ++c) {
                const bool whole = c + 1 < kVectors || rest == kLanes;
                sums[c] += weight * (whole ? load(value + c * kLanes) : load_some(value + c * kLanes, rest));
            }
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
        T* to = out + column + c * kLanes;
        const Floats mean = sums[c] / total;
        if (c + 1 < kVectors || rest == kLanes) {
            store(to, mean);
        } else {
            store_some(to, mean, rest);
        }
    }
}

template <typename T>
void weigh_all(const Span<T>* spans, int64_t span_count, const float* weights, float total, T* out, int64_t size) {
    constexpr int64_t kMost = kColumns * kLanes;
    int64_t column = 0;
    for (; size - column >= kMost; column += kMost) {
        weigh<kColumns>(spans, span_count, weights, total, out, column, kLanes);
    }
    const int64_t columns = size - column;
    const int rest = static_cast<int>((columns - 1) % kLanes + 1);
    static_assert(kColumns == 4);
    switch ((columns + kLanes - 1) / kLanes) {
        case 4: return weigh<4>(spans, span_count, weights, total, out, column, rest);
        case 3: return weigh<3>(spans, span_count, weights, total, out, column, rest);
        case 2: return weigh<2>(spans, span_count, weights, total, out, column, rest);
        case 1: return weigh<1>(spans, span_count, weights, total, out, column, rest);
    }
}

// Asks the memory for `count` vectors of `bytes` bytes, from the k-th on.
inline void fetch(const Vectors& vectors, int64_t i, int64_t j, int64_t k, int64_t count, int64_t bytes) {
    for (const int64_t end = k + count; k < end; ++k) {
        const char* const vector = at<char>(vectors, i, j, k);
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(vector + byte, 0, 2);
    }
}

// next: the row that follows, or -1; its own tokens, which no row before has read, are fetched meanwhile.
template <typename T>
void decode_row(const DecodeAttention& call, int64_t head, int64_t row, int64_t next, float* scratch) {
    const int64_t size = whole_vectors(call.key_size), last = call.level_count - 1;
    const DecodeLevel& own = call.levels[last];
    memcpy(at<T>(own.keys, row, head, own.lengths[row]), at<T>(call.key, row, head), call.key_size * sizeof(T));
    memcpy(at<T>(own.values, row, head, own.lengths[row]), at<T>(call.value, row, head), call.value_size * sizeof(T));

    // what the row sees of each level: the last `window` tokens of its text
    int64_t text = 1;
    for (int64_t level = 0; level <= last; ++level) text += call.levels[level].lengths[row];
    int64_t hidden = call.window > 0 && call.window < text ? text - call.window : 0;
    text -= hidden;
    Span<T> spans[kMostLevels];
    for (int64_t l = 0; l <= last; ++l) {
        const DecodeLevel& level = call.levels[l];
        const int64_t length = level.lengths[row] + (l == last), first = hidden < length ? hidden : length;
        const int64_t node = (level.place ? level.place[row] : row) / level.width;
        spans[l] = {at<T>(level.keys, node, head, first), at<T>(level.values, node, head, first),
                    level.keys.strides[2] / static_cast<int64_t>(sizeof(T)),
                    level.values.strides[2] / static_cast<int64_t>(sizeof(T)), length - first};
        hidden -= first;
    }

    float* const queries = scratch;
    float* const scores = queries + call.group * size;
    const int64_t room = whole_vectors(text) + kLanes;  // floats of one query's scores: whole vectors from any token on
    for (int64_t g = 0; g < call.group; ++g) {
        const T* query = at<T>(call.query, row, head * call.group + g);
        for (int64_t d = 0; d < call.key_size; d += kLanes) {
            const int64_t some = call.key_size - d < kLanes ? call.key_size - d : kLanes;
            store(queries + g * size + d, load_first(query + d, some) * call.scale);
        }
    }
    float* score = scores;
    for (int64_t l = 0; l <= last; ++l) {
        const Span<T>& span = spans[l];
        for (int64_t t = 0; t < span.count; t += kLanes) {
            const int64_t some = span.count - t < kLanes ? span.count - t : kLanes;
            const T* keys = span.keys + t * span.key_stride;
            if (next >= 0 && l == last) {
                fetch(own.keys, next, head, t, some, call.key_size * static_cast<int64_t>(sizeof(T)));
                fetch(own.values, next, head, t, some, call.value_size * static_cast<int64_t>(sizeof(T)));
            }
            for (int64_t g = 0; g < call.group; ++g) {
                // the next span, or -inf, takes the place of lanes that are too many
                const float* const query = queries + g * size;
                store(score + g * room + t,
                      size == call.key_size ? scores_of<false>(query, keys, span.key_stride, some, size)
                                            : scores_of<true>(query, keys, span.key_stride, some, call.key_size));
            }
        }
        score += span.count;
    }
    for (int64_t g = 0; g < call.group; ++g) {
        score = scores + g * room;
        for (int64_t t = 0; call.softcap > 0.0f && t < text; t += kLanes) {
            store(score + t, capped(load(score + t), call.softcap));
        }
        store(score + text, all(-kInfinity));
        const int64_t query = head * call.group + g;
        Floats highest = all(call.sinks ? call.sinks[query] : -kInfinity);
        for (int64_t t = 0; t < text; t += kLanes) highest = greater(load(score + t), highest);
        const float shift = largest(highest);
        Floats sums = {};
        for (int64_t t = 0; t < text; t += kLanes) {
            const Floats weight = exp_negative(load(score + t) - shift);
            store(score + t, weight);
            sums += weight;
        }
        float total = static_cast<float>(sum(sums));
        if (call.sinks) total += exp_of(call.sinks[query] - shift);
        T* out = static_cast<T*>(call.out) + (row * call.heads * call.group + query) * call.value_size;
        weigh_all(spans, call.level_count, score, total, out, call.value_size);
    }
}

void decode(const DecodeAttention& call, int64_t head, int64_t first, int64_t last, void* scratch) {
    with_element(call.element, [&](auto zero) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t next = row + 1 < last ? row + 1 : -1;
            decode_row<decltype(zero)>(call, head, row, next, static_cast<float*>(scratch));
        }
    });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {decode};

}  // namespace r1kernels::R1KERNELS_ISA
