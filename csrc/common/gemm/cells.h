// Cells: the elements that the matrix kernels of this folder multiply, and packing into them.
//
// A cell is what one lane of a multiply-add takes from one operand: a float, or, where the processor multiplies pairs of
// bfloat16 (AVX-512-BF16), two bfloat16 that follow each other along k, the dimension summed over. Float16, and bfloat16
// elsewhere, become floats while they are packed. kDepth<T> elements along k make a cell; the last one is filled with 0.
//
// Included only by files that are compiled once for each instruction set (see vector.h).
#pragma once

#include "common/vector.h"

namespace r1kernels::R1KERNELS_ISA {

template <typename T>
struct CellOf {
    typedef float Cell;
    typedef Floats Vector;
    static constexpr int kDepth = 1;
};

#if defined(__AVX512BF16__)
template <>
struct CellOf<BFloat16> {
    typedef uint32_t Cell;  // the first of the two in the low half
    typedef Words Vector;
    static constexpr int kDepth = 2;
};
#endif

template <typename T>
using Cell = typename CellOf<T>::Cell;
template <typename T>
using CellVector = typename CellOf<T>::Vector;
template <typename T>
constexpr int kDepth = CellOf<T>::kDepth;

// How many cells hold `count` elements along k.
template <typename T>
constexpr int64_t cells_of(int64_t count) { return (count + kDepth<T> - 1) / kDepth<T>; }

// sum + a b in every lane; for pairs sum + a.first b.first + a.second b.second
inline Floats multiply_add(Floats sum, Floats a, Floats b) { return a * b + sum; }
#if defined(__AVX512BF16__)
inline Floats multiply_add(Floats sum, Words a, Words b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

inline Floats in_all_lanes(float cell) { return all(cell); }
inline Words in_all_lanes(uint32_t cell) { return Words{} + cell; }

inline Floats load_vector(const float* from) { return load(from); }
inline Words load_vector(const uint32_t* from) {
    Words value;
    memcpy(&value, from, sizeof value);
    return value;
}
inline void store_vector(float* to, Floats value) { store(to, value); }
inline void store_vector(uint32_t* to, Words value) { memcpy(to, &value, sizeof value); }

// The first `count` < kLanes elements, 0 in the other lanes.
template <typename T>
inline Floats load_front(const T* from, int64_t count) {
    T buffer[kLanes] = {};
    memcpy(buffer, from, count * sizeof(T));
    return load(buffer);
}

// --- kLanes cells of consecutive elements, which follow each other along k ---

template <typename T>
struct AlongK {
    static constexpr int kElements = kLanes * kDepth<T>;
    static Floats load_whole(const T* from) { return load(from); }
    static Floats load_part(const T* from, int64_t count) { return load_front(from, count); }
};

#if defined(__AVX512BF16__)
template <>
struct AlongK<BFloat16> {
    static constexpr int kElements = 2 * kLanes;
    static Words load_whole(const BFloat16* from) { return load_vector(reinterpret_cast<const uint32_t*>(from)); }
    static Words load_part(const BFloat16* from, int64_t count) {
        BFloat16 buffer[kElements] = {};
        memcpy(buffer, from, count * sizeof(BFloat16));
        return load_whole(buffer);
    }
};
#endif

template <typename T>
inline CellVector<T> load_along_k(const T* from, int64_t count) {
    return count >= AlongK<T>::kElements ? AlongK<T>::load_whole(from) : AlongK<T>::load_part(from, count);
}

// --- kLanes cells of different columns: rows k (and k + 1; null: zeros) of a matrix, at the same columns ---

inline Floats down_k(const float* first, const float*, int64_t count) {
    return count >= kLanes ? load(first) : load_front(first, count);
}
inline Floats down_k(const Float16* first, const Float16*, int64_t count) {
    return count >= kLanes ? load(first) : load_front(first, count);
}
#if defined(__AVX512BF16__)
inline Words down_k(const BFloat16* first, const BFloat16* second, int64_t count) {
    const Words low = (Words)(count >= kLanes ? load(first) : load_front(first, count)) >> 16;
    if (second == nullptr) return low;
    return low | (Words)(count >= kLanes ? load(second) : load_front(second, count));
}
#else
inline Floats down_k(const BFloat16* first, const BFloat16*, int64_t count) {
    return count >= kLanes ? load(first) : load_front(first, count);
}
#endif

// --- transposing kLanes vectors of kLanes lanes ---

template <int kSize, typename Vector>
inline void exchange_blocks(Vector* rows) {
    for (int row = 0; row < kLanes; ++row) {
        if (row & kSize) continue;
        const Vector first = rows[row], second = rows[row + kSize];
        rows[row] = choose_lanes(first, second, lower_blocks<kSize>());
        rows[row + kSize] = choose_lanes(first, second, upper_blocks<kSize>());
    }
}

template <typename Vector>
inline void transpose(Vector* rows) {
    exchange_blocks<1>(rows);
    exchange_blocks<2>(rows);
    if constexpr (kLanes >= 8) exchange_blocks<4>(rows);
    if constexpr (kLanes >= 16) exchange_blocks<8>(rows);
}

// The sums over the lanes of kLanes vectors: lane i of the result is the sum of sums[i], always added up as a tree of
// halves, whatever stands in the other vectors.
template <int kHalf>
inline void add_halves(Floats* sums) {
    for (int i = 0; i < kHalf; ++i) {
        sums[i] = choose_lanes(sums[i], sums[i + kHalf], lower_blocks<kHalf>()) +
                  choose_lanes(sums[i], sums[i + kHalf], upper_blocks<kHalf>());
    }
}

inline Floats sums_over_lanes(Floats* sums) {
    if constexpr (kLanes >= 16) add_halves<8>(sums);
    if constexpr (kLanes >= 8) add_halves<4>(sums);
    add_halves<2>(sums);
    add_halves<1>(sums);
    return sums[0];
}

}  // namespace r1kernels::R1KERNELS_ISA
