// The inner loop of the packed matrix products: a tile of a few rows times a packed panel of columns, in registers (for
// tile registers see amx.h).
//
// It has two drivers. blocks.h multiplies blocks of any element type within one thread, for experts: short chains, which
// lose less, into a scratch block that an epilogue reads. bf16.h and cpu.cpp multiply large matrices of bfloat16, for the
// head of a model: one chain along k, which begins with C, so that a row has the same bits however k is cut into passes.
//
// Included only by files that are compiled once for each instruction set (see vector.h).
#pragma once

#include "common/gemm/cells.h"

namespace r1kernels::R1KERNELS_ISA {

constexpr int kTileRows = 6;  // times kPanelVectors vectors: the accumulators of a tile fit into the registers
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int kPanel = kPanelVectors * kLanes;  // columns of a packed panel

// A tile of A by its strides, in cells.
template <typename Cell>
struct StridedCells {
    const Cell* a;
    int64_t row_step, cell_step;
    Cell operator()(int row, int64_t cell) const { return a[row * row_step + cell * cell_step]; }
};

// C (kRows, kPanel) = A B, or += A B, over `depth` cells, one chain of additions per element; left(i, c) is cell c of row
// i of A, B a packed panel. Where kContinued, a chain that accumulates begins with C; else it is added to C at its end.
template <int kRows, bool kContinued, typename Left, typename Cell>
inline void tile_of(const Left& left, const Cell* b, int64_t depth, float* c, int64_t c_stride, bool accumulate) {
    Floats sums[kRows][kPanelVectors] = {};
    if (kContinued && accumulate) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < kPanelVectors; ++j) sums[i][j] = load(c + i * c_stride + j * kLanes);
        }
    }
    for (int64_t cell = 0; cell < depth; ++cell) {
        decltype(load_vector(b)) right[kPanelVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kPanelVectors; ++j) right[j] = load_vector(b + cell * kPanel + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const auto row = in_all_lanes(left(i, cell));
#pragma GCC unroll 8
            for (int j = 0; j < kPanelVectors; ++j) sums[i][j] = multiply_add(sums[i][j], row, right[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kPanelVectors; ++j) {
            float* to = c + i * c_stride + j * kLanes;
            store(to, !kContinued && accumulate ? load(to) + sums[i][j] : sums[i][j]);
        }
    }
}

template <bool kContinued = false, typename Left, typename Cell>
void tile(int64_t rows, const Left& left, const Cell* b, int64_t depth, float* c, int64_t c_stride, bool accumulate) {
    switch (rows) {
        case 1: return tile_of<1, kContinued>(left, b, depth, c, c_stride, accumulate);
        case 2: return tile_of<2, kContinued>(left, b, depth, c, c_stride, accumulate);
        case 3: return tile_of<3, kContinued>(left, b, depth, c, c_stride, accumulate);
        case 4: return tile_of<4, kContinued>(left, b, depth, c, c_stride, accumulate);
        case 5: return tile_of<5, kContinued>(left, b, depth, c, c_stride, accumulate);
        default: return tile_of<kTileRows, kContinued>(left, b, depth, c, c_stride, accumulate);
    }
}

}  // namespace r1kernels::R1KERNELS_ISA
