// The kernels of bf16.h where the processor has vdpbf16ps or tdpbf16ps, compiled once for each instruction set.
//
// Both operands are packed into words of two consecutive k, 16 words of k at a time. A panel of B holds 64 columns, word
// (pair, column) at pair * 64 + column; a block of A lies row after row. Every element of C is the sum over k in one order,
// whatever m, n and the number of threads: a row of A has the same bits in any company. Subnormal numbers count as 0.
#include "common/gemm/bf16.h"

#include "common/gemm/amx.h"

namespace r1kernels::R1KERNELS_ISA {

#if defined(__AVX512BF16__)

namespace {

constexpr int kPanelColumns = kGemmPanelColumns;
constexpr int kRows = kInTiles<BFloat16> ? kStripRows : kTileRows;  // that are multiplied at once
constexpr int64_t kChunk = 128;  // pairs: so much of a panel of B stays in the first-level cache
static_assert(kPanelColumns == kPanel && kGemmBlockRows % kRows == 0 && kGemmStep == kLanes && kGemmPairs % kChunk == 0);

// A matrix by its outer index (a row of A, a column of B) and k.
struct Operand {
    const void* data;
    int64_t outer_stride, k_stride;
};

template <typename T>
uint32_t bits_at(const T* from) {
    BFloat16 bits[kLanes];
    store(bits, load_some(from, 1));
    return bits[0].bits;
}

// 16 pairs of one outer index, k contiguous; from the `count`th k on 0
inline Words pairs_along(const BFloat16* from, int64_t count) { return load_along_k(from, count); }
inline Words pairs_along(const float* from, int64_t count) {
    const Floats first = load_along_k(from, count);
    const Floats second = count > kLanes ? load_along_k(from + kLanes, count - kLanes) : Floats{};
    return (Words)_mm512_cvtne2ps_pbh(second, first);
}

// one pair of 16 outer indices, those contiguous; from the `count`th on 0
inline Words pairs_down(const BFloat16* first, const BFloat16* second, int64_t count) {
    return down_k(first, second, count);
}
inline Words halves_of(const float* from, int64_t count) {
    return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load_along_k(from, count)));
}
inline Words pairs_down(const float* first, const float* second, int64_t count) {
    return second ? halves_of(first, count) | halves_of(second, count) << 16 : halves_of(first, count);
}

// 16 pairs, k from `begin` on, of 16 outer indices as 16 vectors: one of each outer index where kByOuter, else of each pair.
// What lies beyond `count` or `end` is 0.
template <bool kByOuter, typename T>
void load_block(const Operand& from, int64_t outer, int64_t count, int64_t begin, int64_t end, Words* block) {
    const T* data = static_cast<const T*>(from.data) + outer * from.outer_stride + begin * from.k_stride;
    const int64_t size = end - begin;
    const bool by_outer = from.k_stride == 1 || from.outer_stride != 1;
    for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = Words{};
        if (from.k_stride == 1) {
            if (i < count) block[i] = pairs_along(data + i * from.outer_stride, size);
        } else if (from.outer_stride == 1) {
            const T* first = data + 2 * i * from.k_stride;
            if (2 * i < size && count > 0) {
                block[i] = pairs_down(first, 2 * i + 1 < size ? first + from.k_stride : nullptr, count);
            }
        } else if (i < count) {
            for (int64_t k = 0; k < 2 * kLanes && k < size; ++k) {
                block[i][k / 2] |= bits_at(data + i * from.outer_stride + k * from.k_stride) << k % 2 * 16;
            }
        }
    }
    if (by_outer != kByOuter) transpose(block);
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One panel of B: `count` columns from `column`, the rest 0.
template <typename T>
void pack_panel(const Operand& from, int64_t column, int64_t count, int64_t k, uint32_t* panel) {
    for (int64_t lane = 0; lane < kPanelColumns; lane += kLanes) {
        for (int64_t pair = 0; 2 * pair < k; pair += kLanes) {
            Words block[kLanes];
            load_block<false, T>(from, column + lane, count - lane, 2 * pair, k, block);
            for (int i = 0; i < kLanes; ++i) store_vector(panel + (pair + i) * kPanelColumns + lane, block[i]);
        }
    }
}

void pack_b(const Gemm& gemm, int64_t begin, int64_t end) {
    const Operand from = {gemm.b, gemm.b_column_stride, gemm.b_k_stride};
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kPanelColumns;
        const auto pack = gemm.b_is_float32 ? pack_panel<float> : pack_panel<BFloat16>;
        pack(from, column, smaller(gemm.n - column, kPanelColumns), gemm.k, gemm.packed_b + column * gemm_pairs(gemm));
    }
}

// Row after row `pairs` words: k in [begin, end).
template <typename T>
void pack_a(const Gemm& gemm, int64_t row, int64_t count, int64_t begin, int64_t end, int64_t pairs, uint32_t* to) {
    const Operand from = {gemm.a, gemm.a_row_stride, gemm.a_k_stride};
    for (int64_t lane = 0; lane < count; lane += kLanes) {
        for (int64_t pair = 0; pair < pairs; pair += kLanes) {
            Words block[kLanes];
            load_block<true, T>(from, row + lane, count - lane, begin + 2 * pair, end, block);
            for (int i = 0; i < kLanes; ++i) store_vector(to + (lane + i) * pairs + pair, block[i]);
        }
    }
}

// rows x columns products of at most kRows rows of A and a panel of B, added to C or written there.
void multiply_panel(const StridedCells<uint32_t>& a, const uint32_t* b, int64_t pairs, float* c, int64_t c_stride,
                    int64_t rows, int64_t columns, bool add) {
    if (columns == kPanelColumns && (rows == kRows || !kInTiles<BFloat16>)) {
        return tile<true>(rows, a, b, pairs, c, c_stride, add);
    }
    float edge[kRows * kPanelColumns];
    for (int64_t i = 0; add && i < rows; ++i) {
        memcpy(edge + i * kPanelColumns, c + i * c_stride, columns * sizeof(float));
    }
    tile<true>(rows, a, b, pairs, edge, kPanelColumns, add);
    for (int64_t i = 0; i < rows; ++i) memcpy(c + i * c_stride, edge + i * kPanelColumns, columns * sizeof(float));
}

void multiply(const Gemm& gemm, uint32_t* packed_a, int64_t begin, int64_t end) {
    [[maybe_unused]] const Registers<BFloat16> registers;
    const int64_t pairs = gemm_pairs(gemm);
    const auto pack = gemm.a_is_float32 ? pack_a<float> : pack_a<BFloat16>;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first_row = block * kGemmBlockRows, rows = smaller(gemm.m - first_row, kGemmBlockRows);
        for (int64_t pair = 0; pair == 0 || pair < pairs; pair += kGemmPairs) {  // of no products the sum is 0
            const int64_t some = smaller(pairs - pair, kGemmPairs);
            pack(gemm, first_row, rows, 2 * pair, gemm.k, some, packed_a);
            for (int64_t column = 0; column < gemm.n; column += kPanelColumns) {
                const uint32_t* b = gemm.packed_b + column * pairs + pair * kPanelColumns;
                const int64_t columns = smaller(gemm.n - column, kPanelColumns);
                for (int64_t chunk = 0; chunk == 0 || chunk < some; chunk += kChunk) {
                    for (int64_t row = 0; row < rows; row += kRows) {
                        multiply_panel({packed_a + row * some + chunk, some, 1}, b + chunk * kPanelColumns,
                                       smaller(some - chunk, kChunk),
                                       gemm.c + (first_row + row) * gemm.c_stride + column, gemm.c_stride,
                                       smaller(rows - row, kRows), columns, gemm.add || pair + chunk > 0);
                    }
                }
            }
        }
    }
}

}  // namespace

const GemmKernels gemm_kernels = {pack_b, multiply};

#else

const GemmKernels gemm_kernels = {nullptr, nullptr};

#endif

}  // namespace r1kernels::R1KERNELS_ISA
