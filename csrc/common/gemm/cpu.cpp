// The kernels of bf16.h where the processor has vdpbf16ps, compiled once for each instruction set.
//
// Both operands are packed into words of two consecutive k. A panel of B holds 64 columns, word (pair, column) at
// pair * 64 + column; a panel of A holds 6 rows, word (pair, row) at pair * 6 + row. The 6 x 64 products of two panels fill
// 24 registers. Every element of C is the sum over k in one order, whatever m, n and the number of threads: a row of A has
// the same bits in any company. Subnormal numbers count as 0.
#include "common/gemm/bf16.h"

#include "common/gemm/tile.h"

namespace r1kernels::R1KERNELS_ISA {

#if defined(__AVX512BF16__)

namespace {

constexpr int kPanelRows = kGemmPanelRows, kPanelColumns = kGemmPanelColumns;
static_assert(kPanelRows == kTileRows && kPanelColumns == kPanel);

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

// 16 words of consecutive pairs of one row, k contiguous.
inline __m512i pairs_of(const BFloat16* from) { return _mm512_loadu_si512(from); }
inline __m512i pairs_of(const float* from) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
}

// 16 values of one k, outer contiguous, each in the low half of a word.
inline __m512i halves_of(const BFloat16* from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)); }
inline __m512i halves_of(const float* from) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
}

// 16 words, `apart` from one another.
inline void spread(uint32_t* to, int64_t apart, __m512i words) {
    uint32_t word[16];
    _mm512_storeu_si512(word, words);
    for (int i = 0; i < 16; ++i) to[i * apart] = word[i];
}

// One panel: `count` of `width` outer indices from `outer`, k in [begin, end), the rest 0.
template <typename T>
void pack_panel(const Operand& from, int64_t outer, int count, int width, int64_t begin, int64_t end, uint32_t* panel) {
    const T* data = static_cast<const T*>(from.data) + outer * from.outer_stride;
    const int64_t size = end - begin, pairs = (size + 1) / 2, whole = size / 2;
    if (count < width) memset(panel, 0, pairs * width * sizeof(uint32_t));
    if (from.k_stride == 1) {
        for (int i = 0; i < count; ++i) {
            const T* row = data + i * from.outer_stride + begin;
            int64_t pair = 0;
            for (; pair + 16 <= whole; pair += 16) spread(panel + pair * width + i, width, pairs_of(row + 2 * pair));
            for (; pair < pairs; ++pair) {
                const uint32_t high = pair < whole ? bits_at(row + 2 * pair + 1) : 0;
                panel[pair * width + i] = bits_at(row + 2 * pair) | high << 16;
            }
        }
        return;
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const T* even = data + (begin + 2 * pair) * from.k_stride;
        const T* odd = pair < whole ? even + from.k_stride : nullptr;
        uint32_t* to = panel + pair * width;
        int i = 0;
        if (from.outer_stride == 1) {
            for (; i + 16 <= count; i += 16) {
                const __m512i high = odd ? _mm512_slli_epi32(halves_of(odd + i), 16) : _mm512_setzero_si512();
                _mm512_storeu_si512(to + i, _mm512_or_si512(halves_of(even + i), high));
            }
        }
        for (; i < count; ++i) {
            const int64_t at = i * from.outer_stride;
            to[i] = bits_at(even + at) | (odd ? bits_at(odd + at) << 16 : 0);
        }
    }
}

// The panels of 6 from rows that are contiguous: 16 panels' words at a time, cut into sixes.
template <typename T>
void pack_sixes(const Operand& from, int64_t outer, int64_t count, int64_t begin, int64_t end, uint32_t* panels) {
    constexpr int kAtOnce = 16 * kPanelRows;
    const int64_t pairs = (end - begin + 1) / 2, size = pairs * kPanelRows;
    uint32_t wide[kAtOnce];
    for (int64_t first = 0; first < count; first += kAtOnce) {
        const int some = static_cast<int>(count - first < kAtOnce ? count - first : kAtOnce);
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const int64_t k = begin + 2 * pair, stop = k + 2 < end ? k + 2 : end;
            pack_panel<T>(from, outer + first, some, kAtOnce, k, stop, wide);
            for (int i = 0; i < some; i += kPanelRows) {
                memcpy(panels + (first + i) / kPanelRows * size + pair * kPanelRows, wide + i,
                       kPanelRows * sizeof(uint32_t));
            }
        }
    }
}

// Row after row of a panel of A, pair by pair.
struct PanelCells {
    const uint32_t* a;
    uint32_t operator()(int row, int64_t pair) const { return a[pair * kPanelRows + row]; }
};

// rows x columns products of a panel of A and one of B, added to C or written there.
void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c, int64_t c_stride, int64_t rows,
                     int64_t columns, bool add) {
    if (columns == kPanelColumns) return tile<true>(rows, PanelCells{a}, b, pairs, c, c_stride, add);
    float edge[kPanelRows * kPanelColumns] = {};
    for (int64_t i = 0; add && i < rows; ++i) {
        memcpy(edge + i * kPanelColumns, c + i * c_stride, columns * sizeof(float));
    }
    tile<true>(rows, PanelCells{a}, b, pairs, edge, kPanelColumns, add);
    for (int64_t i = 0; i < rows; ++i) memcpy(c + i * c_stride, edge + i * kPanelColumns, columns * sizeof(float));
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

void pack_b(const Gemm& gemm, int64_t begin, int64_t end) {
    const Operand from = {gemm.b, gemm.b_column_stride, gemm.b_k_stride};
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kPanelColumns;
        const int count = static_cast<int>(smaller(gemm.n - column, kPanelColumns));
        uint32_t* to = gemm.packed_b + column * gemm_pairs(gemm);
        const auto pack = gemm.b_is_float32 ? pack_panel<float> : pack_panel<BFloat16>;
        pack(from, column, count, kPanelColumns, 0, gemm.k, to);
    }
}

template <typename T>
void pack_a(const Gemm& gemm, int64_t row, int64_t count, int64_t begin, int64_t end, uint32_t* to) {
    const Operand from = {gemm.a, gemm.a_row_stride, gemm.a_k_stride};
    if (gemm.a_k_stride != 1) return pack_sixes<T>(from, row, count, begin, end, to);
    const int64_t size = (end - begin + 1) / 2 * kPanelRows;
    for (int64_t i = 0; i < count; i += kPanelRows, to += size) {
        pack_panel<T>(from, row + i, static_cast<int>(smaller(count - i, kPanelRows)), kPanelRows, begin, end, to);
    }
}

void multiply(const Gemm& gemm, uint32_t* packed_a, int64_t begin, int64_t end) {
    const int64_t pairs = gemm_pairs(gemm);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first_row = block * kGemmBlockRows, rows = smaller(gemm.m - first_row, kGemmBlockRows);
        for (int64_t pair = 0; pair == 0 || pair < pairs; pair += kGemmPairs) {  // of no products the sum is 0
            const int64_t some = smaller(pairs - pair, kGemmPairs), last = smaller(2 * (pair + some), gemm.k);
            const auto pack = gemm.a_is_float32 ? pack_a<float> : pack_a<BFloat16>;
            pack(gemm, first_row, rows, 2 * pair, last, packed_a);
            for (int64_t column = 0; column < gemm.n; column += kPanelColumns) {
                const uint32_t* b = gemm.packed_b + column * pairs + pair * kPanelColumns;
                for (int64_t row = 0; row < rows; row += kPanelRows) {
                    multiply_panels(packed_a + row * some, b, some,
                                    gemm.c + (first_row + row) * gemm.c_stride + column, gemm.c_stride,
                                    smaller(rows - row, kPanelRows), smaller(gemm.n - column, kPanelColumns),
                                    gemm.add || pair > 0);
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
