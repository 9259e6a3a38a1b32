// Padded (B, T) and packed (N,) tokens, cut into items: runs of at most `chunk` tokens of one sequence.
//
// Which tokens form an item depends on the shape alone, so results depend neither on threads nor on blocks. Padded: each
// sequence has ceil(T / chunk) items. Packed: a sequence of length n that begins at token b has the ceil(n / chunk) items
// from floor(b / chunk) + i on, i being its number. These do not overlap, since
// floor((b + n) / chunk) + 1 - floor(b / chunk) >= floor(n / chunk) + 1 >= ceil(n / chunk); a number in between is an item
// without tokens. No prefix sum is needed, and all of them are less than floor(N / chunk) + B.
#pragma once

#include <cmath>

#include "grpo/call.h"

// The namespace of the functions that the kernels of the CPU (one for each instruction set) and of CUDA share.
#if defined(R1KERNELS_ISA)
#define R1KERNELS_TERM inline
#define R1KERNELS_GRPO_SCOPE R1KERNELS_ISA
#else
#define R1KERNELS_TERM __device__ inline
#define R1KERNELS_GRPO_SCOPE grpo
#endif

namespace r1kernels::R1KERNELS_GRPO_SCOPE {

struct Item {
    int64_t sequence;
    int64_t chunk;       // its place among the items of the sequence
    int64_t begin, end;  // tokens
};

// The first token of a sequence (of the one behind the last: the end). Never outside of the tokens.
R1KERNELS_TERM int64_t boundary(const R1kernelsGrpo& call, int64_t sequence) {
    if (call.cu_seqlens == nullptr) return sequence * call.width;
    const int64_t value = call.cu_seqlens_bytes == 8 ? static_cast<const int64_t*>(call.cu_seqlens)[sequence]
                                                     : static_cast<const int32_t*>(call.cu_seqlens)[sequence];
    return value < 0 ? 0 : (value > call.tokens ? call.tokens : value);
}

R1KERNELS_TERM int64_t chunks_of(int64_t length, int64_t chunk) { return (length + chunk - 1) / chunk; }

R1KERNELS_TERM int64_t first_item(const R1kernelsGrpo& call, int64_t sequence, int64_t chunk) {
    return call.cu_seqlens == nullptr ? sequence * chunks_of(call.width, chunk)
                                      : boundary(call, sequence) / chunk + sequence;
}

// The items of a sequence; none for an empty one.
R1KERNELS_TERM int64_t number_of_chunks(const R1kernelsGrpo& call, int64_t sequence, int64_t chunk) {
    const int64_t length = boundary(call, sequence + 1) - boundary(call, sequence);
    return length > 0 ? chunks_of(length, chunk) : 0;
}

R1KERNELS_TERM Item item_of(const R1kernelsGrpo& call, int64_t number, int64_t chunk) {
    Item item;
    if (call.cu_seqlens == nullptr) {
        const int64_t chunks = chunks_of(call.width, chunk);
        item.sequence = number / chunks;
    } else {  // the last sequence whose first item is not behind this one
        int64_t low = 0, high = call.sequences;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first_item(call, middle, chunk) <= number ? low : high) = middle;
        }
        item.sequence = low;
    }
    const int64_t begin = boundary(call, item.sequence), end = boundary(call, item.sequence + 1);
    item.chunk = number - first_item(call, item.sequence, chunk);
    item.begin = begin + item.chunk * chunk;
    item.end = item.begin + chunk < end ? item.begin + chunk : end;
    if (item.chunk < 0 || item.begin > item.end) item.begin = item.end;  // before the first boundary, or behind the last
    return item;
}

// The weight's divisor but for counts of tokens in a sequence or in the call.
R1KERNELS_TERM float given_divisor(const R1kernelsGrpo& call) {
    return call.numbers.divisor * (call.total == nullptr ? 1.0f : *call.total);
}

}  // namespace r1kernels::R1KERNELS_GRPO_SCOPE
