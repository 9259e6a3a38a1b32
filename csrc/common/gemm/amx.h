// The inner loop with the tile registers of AMX, which hold 16 rows of 16 cells (pairs of bfloat16) or of 16 float32 sums:
// strips of 16 rows of A times columns of a packed panel. The sums of an element are added up in the processor's order,
// which is the same for all elements; subnormal numbers count as 0.
//
// Included only by files that are compiled once for each instruction set (see vector.h).
#pragma once

#include "common/gemm/tile.h"

namespace r1kernels::R1KERNELS_ISA {

// Whether elements of this type are multiplied in tile registers; then the cells of a packed row are a multiple of
// kStepCells, filled with 0.
template <typename T>
constexpr bool kInTiles = false;
constexpr int kStripRows = 16, kStepCells = 16;

template <typename T>
constexpr int64_t packed_cells(int64_t count) {
    const int64_t cells = cells_of<T>(count);
    return kInTiles<T> ? (cells + kStepCells - 1) / kStepCells * kStepCells : cells;
}

// What a product of elements of this type holds while it runs.
template <typename T>
struct Registers {};

#if defined(__AMX_BF16__)

template <>
constexpr bool kInTiles<BFloat16> = true;

// While one lives, the eight tile registers of this thread have 16 rows of 64 bytes.
class TileRegisters {
public:
    TileRegisters() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~TileRegisters() { asm volatile("tilerelease"); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int kTile>
inline void clear_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
template <int kTile>
inline void load_tile(const void* from, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}
// sums += a b: 16 rows of a times 16 columns of b, over 16 cells
template <int kSums, int kA, int kB>
inline void multiply_tiles() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB)); }

template <>
struct Registers<BFloat16> : TileRegisters {};

// Calls function(Number<i>) for each i in [0, kCount).
template <int kNumber>
struct Number { static constexpr int value = kNumber; };
template <int kCount, typename Function>
inline void each(const Function& function) {
    if constexpr (kCount > 0) {
        each<kCount - 1>(function);
        function(Number<kCount - 1>{});
    }
}

// C (16 kStrips, 16 kColumns) = A B, or += A B, over `cells` cells, a multiple of kStepCells. A row of A has `a_stride`
// elements; a row of B lies `b_stride` cells from the one before. With kAhead the strips behind these are fetched meanwhile.
template <int kStrips, int kColumns, bool kAhead = false>
inline void strips_of(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t cells, float* c,
                      int64_t c_stride, bool add) {
    static_assert(kStrips * kColumns <= 4);  // registers 0 to 3 hold the sums, 4 to 6 columns, 6 and 7 strips
    const int64_t a_bytes = a_stride * sizeof(BFloat16), b_bytes = b_stride * sizeof(uint32_t);
    const int64_t c_bytes = c_stride * sizeof(float);
    each<kStrips>([&](auto strip) {
        each<kColumns>([&](auto column) {
            constexpr int kSums = strip.value * kColumns + column.value;
            if (add) {
                load_tile<kSums>(c + strip.value * kStripRows * c_stride + column.value * kLanes, c_bytes);
            } else {
                clear_tile<kSums>();
            }
        });
    });
    for (int64_t cell = 0; cell < cells; cell += kStepCells, a += 2 * kStepCells, b += kStepCells * b_stride) {
        if constexpr (kAhead) {
#pragma GCC unroll 16
            for (int row = kStrips * kStripRows; row < 2 * kStrips * kStripRows; ++row) {
                _mm_prefetch(a + row * a_stride, _MM_HINT_T1);
            }
        }
        if constexpr (kStrips == 1) {
            load_tile<7>(a, a_bytes);
            each<kColumns>([&](auto column) {
                constexpr int kB = 4 + column.value % 3;
                load_tile<kB>(b + column.value * kLanes, b_bytes);
                multiply_tiles<column.value, 7, kB>();
            });
        } else {
            each<kColumns>([&](auto column) { load_tile<4 + column.value>(b + column.value * kLanes, b_bytes); });
            each<kStrips>([&](auto strip) {
                constexpr int kA = 6 + strip.value % 2;
                load_tile<kA>(a + strip.value * kStripRows * a_stride, a_bytes);
                each<kColumns>([&](auto column) {
                    multiply_tiles<strip.value * kColumns + column.value, kA, 4 + column.value>();
                });
            });
        }
    }
    each<kStrips>([&](auto strip) {
        each<kColumns>([&](auto column) {
            store_tile<strip.value * kColumns + column.value>(
                c + strip.value * kStripRows * c_stride + column.value * kLanes, c_bytes);
        });
    });
}

// How many strips are multiplied at once with so many columns: the latency of one sum is hidden by four.
constexpr int64_t strips_at_once(int64_t columns) { return columns <= kLanes ? 4 : columns <= 2 * kLanes ? 2 : 1; }

// The same for one strip or strips_at_once(columns), and a B of just so many columns.
inline void strips(int64_t count, const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t columns, int64_t cells,
                   float* c, int64_t c_stride, bool add) {
    switch (columns / kLanes + (count > 1 ? 4 : 0)) {
        case 1: return strips_of<1, 1>(a, a_stride, b, columns, cells, c, c_stride, add);
        case 2: return strips_of<1, 2>(a, a_stride, b, columns, cells, c, c_stride, add);
        case 3: return strips_of<1, 3, true>(a, a_stride, b, columns, cells, c, c_stride, add);
        case 4: return strips_of<1, 4, true>(a, a_stride, b, columns, cells, c, c_stride, add);
        case 5: return strips_of<4, 1>(a, a_stride, b, columns, cells, c, c_stride, add);
        default: return strips_of<2, 2>(a, a_stride, b, columns, cells, c, c_stride, add);
    }
}

// One strip and a whole panel: see tile.h. A chain that accumulates always begins with C.
template <bool kContinued = false>
inline void tile(int64_t, const StridedCells<uint32_t>& a, const uint32_t* b, int64_t cells, float* c, int64_t c_stride,
                 bool accumulate) {
    strips_of<1, 4>(reinterpret_cast<const BFloat16*>(a.a), 2 * a.row_step, b, kPanel, cells, c, c_stride, accumulate);
}

#endif

}  // namespace r1kernels::R1KERNELS_ISA
