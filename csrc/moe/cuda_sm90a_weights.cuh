// The kernel of the gradients of the weights (cuda.h: R1kernelsMoeWeightProduct) on Hopper: both operands are mn-major,
// their inner dimension is the rows of an expert. hopper_plan.h says how it cuts them up.
#pragma once

#include "moe/cuda_sm90a_block.cuh"
#include "moe/cuda_sm90a_epilogue.cuh"

namespace r1kernels::moe::hopper {

struct WeightCall {
    TensorMap left, right;
    R1kernelsMoeWeightProduct product;
    int m_tiles, n_tiles, tiles;
};

// Tiles of a block, one after another.
struct WeightTiles {
    const WeightCall* call;
    int t;
    int64_t expert, m, n;  // the tile begins at row m, column n of its expert's matrix
    int first, end;        // rows of the expert

    __device__ explicit WeightTiles(const WeightCall& call) : call(&call), t(blockIdx.x) { look(); }
    __device__ bool more() const { return t < call->tiles; }
    __device__ void next() {
        t += gridDim.x;
        look();
    }
    __device__ int k_tiles() const { return static_cast<int>(tiles_of(end - first, kBlockK)); }

private:
    __device__ void look() {
        if (!more()) return;
        const WeightTile tile = weight_tile_at(t, call->m_tiles, call->n_tiles);
        expert = tile.expert;
        m = int64_t{tile.m_tile} * kBlockM;
        n = int64_t{tile.n_tile} * kBlockN;
        first = call->product.schedule.bounds[expert];
        end = call->product.schedule.bounds[expert + 1];
    }
};

template <class Scalar, bool kGatheredLeft, bool kGatheredRight>
struct WeightKernel {
    // One warp: kBlockK rows from `first` on, by the copy engine, or by its lanes where they are gathered or where rows
    // behind the last of the expert must become zeros.
    template <int kSize>
    __device__ static void copy(unsigned char* to, const R1kernelsMoeRows& rows, int first, int end, int64_t column,
                                int64_t columns) {
        int sources[kBlockK / 32];
#pragma unroll
        for (int part = 0; part < kBlockK / 32; ++part) {
            sources[part] = source_row(rows, first + part * 32 + lane_id(), end);
        }
        copy_mn_major<kSize>(to, static_cast<const Scalar*>(rows.data), sources, static_cast<int>(column), columns);
    }

    __device__ static void produce(const WeightCall& call, const Stages& stages, int warp) {
        unsigned char* a = stages.a + warp * kStageBytesA;
        unsigned char* b = stages.b + warp * kStageBytesB;
        Barrier* full = stages.full + warp;
        uint32_t steps = 0;
        for (WeightTiles tiles(call); tiles.more(); tiles.next()) {
            const int k_tiles = tiles.k_tiles();
            for (int k = first_step_of(warp, steps); k < k_tiles; k += kStages) {
                const Step step = {steps + k};
                const int first = tiles.first + k * kBlockK;
                const bool whole = first + kBlockK <= tiles.end;
                const bool load_a = whole && !kGatheredLeft, load_b = whole && !kGatheredRight;
                const int m = static_cast<int>(tiles.m), n = static_cast<int>(tiles.n);
                wait_until_free(stages, warp, step);
                if (lane_id() == 0) {
                    barrier_expect(full, (load_a ? kStageBytesA : 0) + (load_b ? kStageBytesB : 0));
                    if (load_a) load_mn_major<kBlockM>(call.left, full, a, m, first, 0);
                    if (load_b) load_mn_major<kBlockN>(call.right, full, b, n, first, 0);
                }
                if (!load_a) copy<kBlockM>(a, call.product.left, first, tiles.end, m, call.product.m);
                if (!load_b) copy<kBlockN>(b, call.product.right, first, tiles.end, n, call.product.n);
                finish_copies();
                barrier_arrive(full);
            }
            steps += k_tiles;
        }
    }

    __device__ static void multiply(const WeightCall& call, const Stages& stages, int thread) {
        Multiplier<Scalar, true, true> product;
        uint32_t steps = 0;
        for (WeightTiles tiles(call), next = tiles; tiles.more(); tiles = next) {
            consume(product, stages, steps, tiles.k_tiles(), thread);
            next.next();  // the rows of its expert arrive while this tile is written
            const int64_t m = call.product.m, n = call.product.n;
            Scalar* out = static_cast<Scalar*>(call.product.out) + (tiles.expert * m + tiles.m) * n;
            store_tile(product, out, m - tiles.m, n, tiles.n, thread);
        }
    }
};

template <class Scalar, bool kGatheredLeft, bool kGatheredRight>
__global__ void __launch_bounds__(kThreads, 1) hopper_weights_kernel(const __grid_constant__ WeightCall call) {
    run_roles<WeightKernel<Scalar, kGatheredLeft, kGatheredRight>>(call, true);
}

}  // namespace r1kernels::moe::hopper
