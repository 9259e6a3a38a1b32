// product_nt and product_nt_pair of bfloat16 (see blocks.h) in tile registers. The rows of B, which are weights, are the
// strips and are read as they lie in memory; A alone is packed, turned. The sums (n, rows of A) are turned on their way to C.
//
// Included only by files that are compiled once for each instruction set (see vector.h).
#pragma once

#include "common/gemm/blocks.h"

namespace r1kernels::R1KERNELS_ISA {

#if defined(__AMX_BF16__)

// C (count, n) = the first `count` of kPanel columns of the sums, or += them.
inline void turn_sums(const float* sums, int64_t n, int64_t count, float* c, int64_t c_stride, bool onto) {
    for (int64_t column = 0; column < n; column += kLanes) {
        for (int64_t row = 0; row < count; row += kLanes) {
            Floats block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) block[i] = load(sums + (column + i) * kPanel + row);
            transpose(block);
            float* to = c + row * c_stride + column;
            for (int i = 0; i < kLanes && row + i < count; ++i, to += c_stride) {
                store(to, onto ? load(to) + block[i] : block[i]);
            }
        }
    }
}

// The products of A with one or two matrices B; those of the second stand from column `apart` of C on.
template <int kMatrices>
void turned_product(const Rows<BFloat16>& a, int64_t m, const BFloat16* const (&matrices)[kMatrices], int64_t b_stride,
                    int64_t n, int64_t k, int64_t apart, float* c, int64_t c_stride, const Workspace& workspace,
                    bool onto) {
    constexpr int64_t kPairs = kDepth<BFloat16>;
    const TileRegisters registers;
    float* sums = static_cast<float*>(workspace.left());
    auto* copied = reinterpret_cast<uint32_t*>(sums + kBlockColumns * kPanel);
    auto* right = static_cast<uint32_t*>(workspace.right());
    for (int64_t first = 0; first < m; first += kPanel) {
        const int64_t count = m - first < kPanel ? m - first : kPanel, width = whole_vectors(count);
        // so much of k is packed at a time, and so many cells of it stay in the first-level cache
        const int64_t packed = kBlockDepth * kPanel / width / kStepCells * kStepCells, step = kPairs * packed;
        const int64_t chunk = kChain * kPanel / width / kStepCells * kStepCells;
        for (int64_t begin = 0; begin < k; begin += step) {
            const int64_t size = k - begin < step ? k - begin : step, cells = packed_cells<BFloat16>(size);
            pack_transposed(a.from(first), count, width, begin, size, right);
            for (int64_t cell = 0; cell < cells; cell += chunk) {
                const int64_t some = cells - cell < chunk ? cells - cell : chunk, at = begin + kPairs * cell;
                for (int matrix = 0; matrix < kMatrices; ++matrix) {
                    for (int64_t row = 0, rows; row < n; row += rows) {
                        const Rows<BFloat16> b = {matrices[matrix] + row * b_stride, b_stride, nullptr};
                        float* to = sums + (matrix * apart + row) * kPanel;
                        rows = kStripRows * strips_at_once(width);
                        if (at + kPairs * some <= k && row + rows <= n) {
                            strips(rows / kStripRows, b.data + at, b_stride, right + cell * width, width, some, to, kPanel,
                                   at > 0);
                        } else {  // nothing may be read beyond a row's end or the last row
                            rows = kStripRows;
                            const int64_t size_here = k - at < kPairs * some ? k - at : kPairs * some;
                            pack_rows(b, n - row < rows ? n - row : rows, at, size_here, copied);
                            strips(1, reinterpret_cast<const BFloat16*>(copied), kPairs * some, right + cell * width,
                                   width, some, to, kPanel, at > 0);
                        }
                    }
                }
            }
        }
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
            const int64_t column = matrix * apart;
            turn_sums(sums + column * kPanel, n, count, c + first * c_stride + column, c_stride, onto);
        }
    }
}

inline void product_nt(const Rows<BFloat16>& a, int64_t m, const BFloat16* b, int64_t b_stride, int64_t n, int64_t k,
                       float* c, int64_t c_stride, const Workspace& workspace, bool onto = false) {
    turned_product<1>(a, m, {b}, b_stride, n, k, 0, c, c_stride, workspace, onto);
}

inline void product_nt_pair(const Rows<BFloat16>& a, int64_t m, const BFloat16* first, const BFloat16* second,
                            int64_t b_stride, int64_t n, int64_t k, int64_t apart, float* c, int64_t c_stride,
                            const Workspace& workspace, bool onto = false) {
    turned_product<2>(a, m, {first, second}, b_stride, n, k, apart, c, c_stride, workspace, onto);
}

#endif

}  // namespace r1kernels::R1KERNELS_ISA
