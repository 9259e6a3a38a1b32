// The kernel of the products with rows (cuda.h: R1kernelsMoeProduct) on Hopper. hopper_plan.h says how it cuts them up.
#pragma once

#include "moe/cuda_sm90a_block.cuh"
#include "moe/cuda_sm90a_epilogue.cuh"

namespace r1kernels::moe::hopper {

struct RowCall {
    TensorMap x, weight;
    R1kernelsMoeProduct product;
    int column_tiles, tiles;
};

// Tiles of a block, one after another.
struct RowTiles {
    const RowCall* call;
    int t;
    R1kernelsMoeTile rows;  // expert -1: no tile
    int column_tile;

    __device__ explicit RowTiles(const RowCall& call) : call(&call), t(blockIdx.x) { look(); }
    __device__ bool more() const { return t < call->tiles; }
    __device__ void next() {
        t += gridDim.x;
        look();
    }

    // Its rows are of an expert, or rows of no expert that are to be cleared.
    __device__ bool counts() const {
        return rows.expert >= 0 && (call->product.clear_rest || rows.expert < call->product.schedule.experts);
    }
    __device__ bool unowned() const { return rows.expert == call->product.schedule.experts; }
    __device__ int k_tiles() const { return unowned() ? 0 : static_cast<int>(tiles_of(call->product.depth, kBlockK)); }

private:
    __device__ void look() {
        rows.expert = -1;
        if (!more()) return;
        const RowTile tile = row_tile_at(t, call->column_tiles);
        column_tile = tile.column_tile;
        if (tile.row_tile < call->product.schedule.tile_count) rows = call->product.schedule.tiles[tile.row_tile];
    }
};

// kActivation: of the epilogues that have one.
template <class Scalar, R1kernelsMoeEpilogue kEpilogue, bool kMnMajorB, Activation kActivation>
struct RowKernel {
    static constexpr bool kGathered = kEpilogue != R1KERNELS_MOE_STORE;
    using Product = Multiplier<Scalar, false, kMnMajorB>;

    __device__ static int64_t column_of(const RowTiles& tiles) {
        return int64_t{tiles.column_tile} * tile_columns(kEpilogue);
    }

    // One lane: the tile of the weight, and of rows that are not gathered, by the copy engine.
    __device__ static void load(const RowCall& call, const RowTiles& tiles, Barrier* barrier, unsigned char* a,
                                unsigned char* b, int k) {
        barrier_expect(barrier, kStageBytesB + (kGathered ? 0 : kStageBytesA));
        const int expert = tiles.rows.expert, column = static_cast<int>(column_of(tiles));
        if (!kGathered) load_box(call.x, barrier, a, k, tiles.rows.first, 0);
        if (kMnMajorB) {
            load_mn_major<kBlockN>(call.weight, barrier, b, column, k, expert);
            return;
        }
        const int second = kEpilogue == R1KERNELS_MOE_UP ? static_cast<int>(call.product.columns / 2) + column
                                                         : column + static_cast<int>(kWeightBoxRows);
        load_box(call.weight, barrier, b, k, column, expert);
        load_box(call.weight, barrier, b + kWeightBoxRows * kLineBytes, k, second, expert);
    }

    __device__ static void produce(const RowCall& call, const Stages& stages, int warp) {
        unsigned char* a = stages.a + warp * kStageBytesA;
        unsigned char* b = stages.b + warp * kStageBytesB;
        const Scalar* data = static_cast<const Scalar*>(call.product.x.data);
        uint32_t steps = 0;
        for (RowTiles tiles(call); tiles.more(); tiles.next()) {
            if (!tiles.counts()) continue;
            const int k_tiles = tiles.k_tiles();
            int rows[kBlockM / 32];
            if (kGathered && k_tiles > 0) {
#pragma unroll
                for (int part = 0; part < kBlockM / 32; ++part) {
                    rows[part] = source_row(call.product.x, tiles.rows.first + part * 32 + lane_id(), tiles.rows.end);
                }
            }
            for (int k = first_step_of(warp, steps); k < k_tiles; k += kStages) {
                const Step step = {steps + k};
                wait_until_free(stages, warp, step);
                if (lane_id() == 0) load(call, tiles, stages.full + warp, a, b, k * kBlockK);
                if (!kGathered) continue;
                copy_k_major<kBlockM>(a, data, rows, k * kBlockK, call.product.depth);
                finish_copies();
                barrier_arrive(stages.full + warp);
            }
            steps += k_tiles;
        }
    }

    __device__ static void multiply(const RowCall& call, const Stages& stages, int thread) {
        Product product;
        uint32_t steps = 0;
        for (RowTiles tiles(call), next = tiles; tiles.more(); tiles = next) {
            if (tiles.counts()) consume(product, stages, steps, tiles.k_tiles(), thread);
            next.next();  // its place in the schedule arrives while this tile is written
            if (tiles.counts()) store(call, product, tiles, thread);
        }
    }

private:
    __device__ static void store(const RowCall& call, const Product& product, const RowTiles& tiles, int thread) {
        const int64_t column = column_of(tiles);
        if constexpr (kEpilogue == R1KERNELS_MOE_STORE) {
            Scalar* out = static_cast<Scalar*>(call.product.out) + tiles.rows.first * call.product.columns;
            store_tile(product, out, tiles.rows.end - tiles.rows.first, call.product.columns, column, thread);
        } else if constexpr (kEpilogue == R1KERNELS_MOE_UP) {
            store_up<Scalar, kActivation>(product, call.product, tiles.rows, column, thread);
        } else {
            store_gate_backward<Scalar, kActivation>(product, call.product, tiles.rows, column, tiles.unowned(), thread);
        }
    }
};

template <class Scalar, R1kernelsMoeEpilogue kEpilogue, bool kMnMajorB, Activation kActivation = Activation::silu>
__global__ void __launch_bounds__(kThreads, 1) hopper_rows_kernel(const __grid_constant__ RowCall call) {
    using Kernel = RowKernel<Scalar, kEpilogue, kMnMajorB, kActivation>;
    run_roles<Kernel>(call, Kernel::kGathered);
}

template <class Scalar, Activation kActivation>
auto row_kernel_of(const R1kernelsMoeProduct& product) {
    switch (product.epilogue) {
        case R1KERNELS_MOE_UP: return hopper_rows_kernel<Scalar, R1KERNELS_MOE_UP, false, kActivation>;
        case R1KERNELS_MOE_GATE_BACKWARD:
            return hopper_rows_kernel<Scalar, R1KERNELS_MOE_GATE_BACKWARD, true, kActivation>;
        default:
            return product.transposed ? hopper_rows_kernel<Scalar, R1KERNELS_MOE_STORE, false>
                                      : hopper_rows_kernel<Scalar, R1KERNELS_MOE_STORE, true>;
    }
}

// The kernel that is compiled for a product.
template <class Scalar>
auto row_kernel_of(const R1kernelsMoeProduct& product) {
    return product.gating.activation == Activation::silu ? row_kernel_of<Scalar, Activation::silu>(product)
                                                         : row_kernel_of<Scalar, Activation::gelu_tanh>(product);
}

}  // namespace r1kernels::moe::hopper
