// How the Hopper kernels of the grouped products cut up their work: tiles, stages, boxes of the copy engine, shared
// memory. Plain C++, the same functions on the host and on the device, so that tests can go through every case.
//
// A block multiplies tiles of kBlockM x kBlockN, kBlockK of the inner dimension at a time. Operands lie in shared memory
// in lines of 128 bytes, swizzled as wgmma and the copy engine name it (128B): a line is a row of kBlockK elements where
// the inner dimension is contiguous in memory (k-major), else 64 neighbouring elements of one k (mn-major).
//
// Four producer warps fill one stage each, two warpgroups of consumers multiply. Step s of a block (its k tiles counted
// over all its tiles) uses stage s % kStages for the (s / kStages)-th time. A stage is filled when its full barrier has
// completed that phase and free when its empty barrier has completed the one before.
#pragma once

#include <cmath>
#include <cstdint>

#include "moe/cuda.h"

#ifdef __CUDACC__
#define R1KERNELS_HOPPER_BOTH __host__ __device__ inline
#else
#define R1KERNELS_HOPPER_BOTH inline
#endif

namespace r1kernels::moe::hopper {

constexpr int kBlockM = 128, kBlockN = 256, kBlockK = 64;
constexpr int kElementBytes = 2;
constexpr int kLineBytes = 128, kLineElements = kLineBytes / kElementBytes;
constexpr int kChunkBytes = 16, kChunkElements = kChunkBytes / kElementBytes, kLineChunks = kLineBytes / kChunkBytes;
static_assert(kLineElements == kBlockK, "a line is a row of a k-major operand");

constexpr int kStages = 4;
constexpr int kProducerWarps = kStages, kConsumerWarps = 8;
constexpr int kThreads = 32 * (kProducerWarps + kConsumerWarps);
constexpr int kStageBytesA = kBlockM * kBlockK * kElementBytes, kStageBytesB = kBlockN * kBlockK * kElementBytes;
constexpr int kSharedAlignment = 1024;  // the swizzle repeats after 8 lines
constexpr int kSharedBytes = kSharedAlignment + kStages * (kStageBytesA + kStageBytesB) + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 << 10, "the most that a block gets on Hopper");

// Row tiles that are worked on side by side, so that they find their tile of the weight in the L2 cache.
constexpr int kGroup = 8;

// --- barriers ---

struct Step {
    uint32_t count;  // k tiles before this one
    R1KERNELS_HOPPER_BOTH int stage() const { return count % kStages; }
    R1KERNELS_HOPPER_BOTH uint32_t full_parity() const { return count / kStages & 1; }
    R1KERNELS_HOPPER_BOTH uint32_t empty_parity() const { return full_parity() ^ 1; }
};

// The first k tile of a tile that producer warp `warp` fills, `steps` k tiles having gone before; then every kStages-th.
R1KERNELS_HOPPER_BOTH int first_step_of(int warp, uint32_t steps) { return (warp - steps) & (kStages - 1); }
static_assert((kStages & (kStages - 1)) == 0, "first_step_of takes the remainder with a mask");

// One lane announces the bytes that the copy engine will bring; where lanes copy as well, each arrives when its part lies.
R1KERNELS_HOPPER_BOTH constexpr int full_arrivals(bool lanes_copy) { return lanes_copy ? 33 : 1; }
constexpr int kEmptyArrivals = kConsumerWarps;

// --- shared memory ---

// Byte offset of 16-byte chunk `chunk` of line `line`.
R1KERNELS_HOPPER_BOTH constexpr int swizzled(int line, int chunk) {
    return line * kLineBytes + ((chunk ^ (line & (kLineChunks - 1))) * kChunkBytes);
}

// Byte offset of an element of an operand: `mn` along M or N.
R1KERNELS_HOPPER_BOTH constexpr int k_major_offset(int mn, int k) {
    return swizzled(mn, k / kChunkElements) + k % kChunkElements * kElementBytes;
}
R1KERNELS_HOPPER_BOTH constexpr int mn_major_offset(int mn, int k) {
    return swizzled(mn / kLineElements * kBlockK + k, mn % kLineElements / kChunkElements) +
           mn % kChunkElements * kElementBytes;
}

// --- boxes of the copy engine ---

// A tensor (dims[2], dims[1], dims[0]), dims[0] contiguous, strides in bytes of dims[1] and dims[2], and the box that one
// copy brings. Elements of a box that lie outside the tensor arrive as zeros and count as bytes.
struct Boxes {
    const void* data;
    uint64_t dims[3];
    uint64_t strides[2];
    uint32_t box[3];
    R1KERNELS_HOPPER_BOTH uint32_t bytes() const { return box[0] * box[1] * box[2] * kElementBytes; }
};

// (count, rows, columns) in boxes of box_rows lines.
inline Boxes boxes_of(const void* data, int64_t count, int64_t rows, int64_t columns, uint32_t box_rows) {
    const uint64_t row = static_cast<uint64_t>(columns) * kElementBytes;
    return {data,
            {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows), static_cast<uint64_t>(count)},
            {row, row * static_cast<uint64_t>(rows)},
            {kLineElements, box_rows, 1}};
}

constexpr uint32_t kWeightBoxRows = 128;  // of a k-major weight: two boxes a stage, gate and up have one each

// --- tiles of a product with rows ---

struct RowTile {
    int row_tile, column_tile;
};

// Tile t of a grid of groups of kGroup row tiles, each group column by column.
R1KERNELS_HOPPER_BOTH RowTile row_tile_at(int t, int column_tiles) {
    const int group = t / (kGroup * column_tiles), rest = t % (kGroup * column_tiles);
    return {group * kGroup + rest % kGroup, rest / kGroup};
}

R1KERNELS_HOPPER_BOTH constexpr int64_t tiles_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Columns of one tile: of an UP product so many of the gate and of the up projection.
R1KERNELS_HOPPER_BOTH constexpr int64_t tile_columns(R1kernelsMoeEpilogue epilogue) {
    return epilogue == R1KERNELS_MOE_UP ? kBlockN / 2 : kBlockN;
}
R1KERNELS_HOPPER_BOTH constexpr int64_t column_tiles_of(R1kernelsMoeEpilogue epilogue, int64_t columns) {
    return tiles_of(epilogue == R1KERNELS_MOE_UP ? columns / 2 : columns, tile_columns(epilogue));
}

// What the kernel of a product is launched with. `tiles` may be past the row tiles that are there, by part of a group.
struct RowPlan {
    int64_t column_tiles, tiles, blocks;
    Boxes x, weight;
};

inline int64_t blocks_of(int64_t tiles, int64_t processors) { return tiles < processors ? tiles : processors; }

inline RowPlan plan_of(const R1kernelsMoeProduct& product, int64_t processors) {
    RowPlan plan;
    plan.column_tiles = column_tiles_of(product.epilogue, product.columns);
    plan.tiles = tiles_of(product.schedule.tile_count, kGroup) * kGroup * plan.column_tiles;
    plan.blocks = blocks_of(plan.tiles, processors);
    plan.x = boxes_of(product.x.data, 1, product.schedule.rows, product.depth, kBlockM);
    plan.weight = product.transposed
                      ? boxes_of(product.weight, product.schedule.experts, product.columns, product.depth, kWeightBoxRows)
                      : boxes_of(product.weight, product.schedule.experts, product.depth, product.columns, kBlockK);
    return plan;
}

// --- tiles of a gradient of the weights ---

struct WeightTile {
    int expert, m_tile, n_tile;
};

R1KERNELS_HOPPER_BOTH WeightTile weight_tile_at(int t, int m_tiles, int n_tiles) {
    const int rest = t % (m_tiles * n_tiles);
    return {t / (m_tiles * n_tiles), rest % m_tiles, rest / m_tiles};
}

struct WeightPlan {
    int64_t m_tiles, n_tiles, tiles, blocks;
    Boxes left, right;
};

inline WeightPlan plan_of(const R1kernelsMoeWeightProduct& product, int64_t processors) {
    WeightPlan plan;
    plan.m_tiles = tiles_of(product.m, kBlockM);
    plan.n_tiles = tiles_of(product.n, kBlockN);
    plan.tiles = product.schedule.experts * plan.m_tiles * plan.n_tiles;
    plan.blocks = blocks_of(plan.tiles, processors);
    plan.left = boxes_of(product.left.data, 1, product.schedule.rows, product.m, kBlockK);
    plan.right = boxes_of(product.right.data, 1, product.schedule.rows, product.n, kBlockK);
    return plan;
}

// --- what the kernels take ---

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0; }

// Rows of so many elements begin at multiples of 16 bytes if their first one does, and fit the copy engine's coordinates.
inline bool whole_chunks(int64_t elements) {
    return elements > 0 && elements % kChunkElements == 0 && elements < int64_t{1} << 31;
}

// The gates that are compiled; another one goes to the portable kernels.
inline bool is_plain(const Gating& gating) {
    return gating.alpha == 1.0f && gating.limit == INFINITY && gating.shift == 0.0f;
}

inline bool takes(const R1kernelsMoeProduct& product) {
    if (product.low.rows != nullptr || product.scale != 1.0f) return false;
    if (product.epilogue != R1KERNELS_MOE_STORE && !is_plain(product.gating)) return false;
    const bool gathered = product.x.index != nullptr;
    const bool up = product.epilogue == R1KERNELS_MOE_UP, down = product.epilogue == R1KERNELS_MOE_STORE;
    // the combinations that are compiled: the up projection and the gradient of its output gather, the others do not
    if (down ? gathered : !gathered || (product.transposed != 0) != up) return false;
    const int64_t columns = up ? product.columns / 2 : product.columns;
    return product.element != Element::float32 && whole_chunks(columns) && whole_chunks(product.depth) &&
           (!up || product.columns % 2 == 0) && aligned(product.x.data) && aligned(product.weight) &&
           aligned(product.out) && aligned(product.activated) && aligned(product.pre_activation);
}

inline bool takes(const R1kernelsMoeWeightProduct& product) {
    return product.element != Element::float32 && whole_chunks(product.m) && whole_chunks(product.n) &&
           aligned(product.left.data) && aligned(product.right.data) && aligned(product.out) &&
           product.schedule.rows > 0 &&  // else there is nothing to describe to the copy engine
           (product.left.index == nullptr || product.right.index == nullptr);
}

}  // namespace r1kernels::moe::hopper
