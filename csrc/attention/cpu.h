// The CPU kernel of decode_attention: rows and heads, for a caller that shares them out to threads.
//
// B rows, Hq and Hk heads of queries and keys, G = Hq / Hk, L tokens, D and Dv their widths. A row is computed by one thread, in
// an order that its own text alone decides: its bits depend neither on the other rows nor on the number of threads.
// Arguments are trusted.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace r1kernels {

constexpr int64_t kMostLevels = 8;  // the rows' own caches among them

// A tensor of vectors: vector (i, j, k) begins strides[0] i + strides[1] j + strides[2] k bytes behind data.
struct Vectors {
    char* data;
    int64_t strides[3];
};

// Keys (N, Hk, L, D) and values (N, Hk, L, Dv) of one level.
struct DecodeLevel {
    Vectors keys, values;
    const int64_t* lengths;  // (B,): tokens of its node that row b sees
    const int64_t* place;    // (B,): row b reads node place[b] / width; null: b / width
    int64_t width;
};

struct DecodeAttention {
    Element element;
    int64_t rows, heads, group, key_size, value_size;  // B, Hk, G, D, Dv
    Vectors query, key, value;  // (B, Hq, D), (B, Hk, D), (B, Hk, Dv)
    // in the order of the text; the last one's nodes are the rows, whose lengths do not count the token that is written behind them
    DecodeLevel levels[kMostLevels];
    int64_t level_count;
    float scale;
    int64_t window;      // tokens that a token sees, itself among them; 0: all
    float softcap;       // 0: none
    const float* sinks;  // (Hq,), or null
    void* out;           // (B, Hq, Dv)
};

struct AttentionKernels {
    // Rows [first, last) of one head of keys; scratch: decode_scratch bytes, 64-byte aligned.
    void (*decode)(const DecodeAttention& call, int64_t head, int64_t first, int64_t last, void* scratch);
};

// Bytes of scratch for texts of at most `tokens` tokens: the queries of a group and their scores, in whole vectors.
inline int64_t decode_scratch(const DecodeAttention& call, int64_t tokens) {
    constexpr int64_t kPadding = 3 * 16;
    return call.group * (call.key_size + tokens + kPadding) * static_cast<int64_t>(sizeof(float));
}

R1KERNELS_DECLARE_TABLES(AttentionKernels, attention_kernels)

}  // namespace r1kernels
