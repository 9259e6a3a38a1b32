// What becomes of the sums of a tile of a grouped product over rows; see R1kernelsMoeEpilogue.
//
// Notation: x token, (g, u) = pre-activation, A = act(g) u, s routing weight, dO gradient of the output,
//     dA' = dO W2        dS = <dA', A>        dg = s dA' u act'(g)        du = s dA' act(g)
#pragma once

#include "moe/cuda_gate.cuh"
#include "moe/cuda_multiply.cuh"

namespace r1kernels::moe {

template <class Scalar>
__device__ inline float rounded(float value) {
    return to_float(from_float<Scalar>(value));
}

// Row `row` of a matrix, or null of none.
template <class Scalar>
__device__ inline Scalar* row_of(void* matrix, int64_t row, int64_t length) {
    return matrix ? static_cast<Scalar*>(matrix) + row * length : nullptr;
}

// How many of the columns that a thread holds lie side by side in a tile; of an UP product the second half is up.
template <R1kernelsMoeEpilogue kEpilogue>
constexpr int kColumnsOfTile = kEpilogue == R1KERNELS_MOE_UP ? kTileColumns / 2 : kTileColumns;

template <class Scalar, class Sums>
__device__ inline void store(const R1kernelsMoeProduct& product, const R1kernelsMoeTile& tile, int first_column,
                             const Sums& sums) {
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        if (Sums::row(i) >= tile.end - tile.first) continue;
        const int64_t row = tile.first + Sums::row(i);
        Scalar* out = row_of<Scalar>(product.out, row, product.columns);
#pragma unroll
        for (int run = 0; run < Sums::kRuns; ++run) {
            Scalar values[kChunk<Scalar>];
#pragma unroll
            for (int j = 0; j < kChunk<Scalar>; ++j) values[j] = from_float<Scalar>(sums.value(i, run, j));
            store_chunk(out, first_column + kWarpColumns * warp_column() + Sums::column(run),
                        static_cast<int>(product.columns), values);
        }
    }
}

// Run 0 of a thread is gate, run 1 up, at the same columns of I.
template <class Scalar, class Sums>
__device__ inline void store_up(const R1kernelsMoeProduct& product, const R1kernelsMoeTile& tile, int first_column,
                                const Sums& sums) {
    const int size = static_cast<int>(product.columns / 2);
    const int column = first_column + kRunColumns * warp_column() + Sums::column(0);
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        if (Sums::row(i) >= tile.end - tile.first) continue;
        const int64_t row = tile.first + Sums::row(i);
        Scalar gate[kChunk<Scalar>], up[kChunk<Scalar>], activated[kChunk<Scalar>];
#pragma unroll
        for (int j = 0; j < kChunk<Scalar>; ++j) {
            gate[j] = from_float<Scalar>(sums.value(i, 0, j));
            up[j] = from_float<Scalar>(sums.value(i, 1, j));
            const float act = gate_of(product.activation, to_float(gate[j])).value;
            activated[j] = from_float<Scalar>(act * to_float(up[j]));
        }
        if (Scalar* kept = row_of<Scalar>(product.out, row, product.columns)) {
            store_chunk(kept, column, size, gate);
            store_chunk(kept + size, column, size, up);
        }
        if (Scalar* to = row_of<Scalar>(product.activated, row, size)) store_chunk(to, column, size, activated);
    }
}

template <class Scalar, class Sums>
__device__ inline void store_gate_backward(const R1kernelsMoeProduct& product, const R1kernelsMoeTile& tile,
                                           int first_column, const Sums& sums) {
    const int size = static_cast<int>(product.columns);
    const int warp_first = first_column + kWarpColumns * warp_column();
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        const bool exists = Sums::row(i) < tile.end - tile.first;
        float product_with_a = 0.0f;
        if (exists) {
            const int64_t row = tile.first + Sums::row(i);
            const Scalar* pre = static_cast<const Scalar*>(product.pre_activation) + row * 2 * size;
            Scalar* out = row_of<Scalar>(product.out, row, 2 * int64_t{size});
            Scalar* activated = row_of<Scalar>(product.activated, row, size);
            const float s = product.scales[product.order[row]];
#pragma unroll
            for (int run = 0; run < Sums::kRuns; ++run) {
                const int column = warp_first + Sums::column(run);
                const Chunk<Scalar> gates = load_chunk(pre, column, size), ups = load_chunk(pre + size, column, size);
                Scalar scaled[kChunk<Scalar>], grad_gate[kChunk<Scalar>], grad_up[kChunk<Scalar>];
#pragma unroll
                for (int j = 0; j < kChunk<Scalar>; ++j) {
                    const Gate gate = gate_of(product.activation, gates[j]);
                    const float a = rounded<Scalar>(gate.value * ups[j]), da = sums.value(i, run, j);
                    if (column + j < size) product_with_a += da * a;
                    scaled[j] = from_float<Scalar>(s * a);
                    grad_gate[j] = from_float<Scalar>(s * da * ups[j] * gate.slope);
                    grad_up[j] = from_float<Scalar>(s * da * gate.value);
                }
                if (activated) store_chunk(activated, column, size, scaled);
                if (out) {
                    store_chunk(out, column, size, grad_gate);
                    store_chunk(out + size, column, size, grad_up);
                }
            }
        }
        if (product.partials == nullptr) continue;
#pragma unroll
        for (int lanes = 1; lanes < Sums::kLanesOfRow; lanes *= 2) {
            product_with_a += __shfl_xor_sync(kWholeWarp, product_with_a, lanes);
        }
        if (exists && lane_id() % Sums::kLanesOfRow == 0 && warp_first < size) {
            const int64_t part = warp_first / R1KERNELS_MOE_PART_COLUMNS;
            product.partials[part * product.schedule.rows + tile.first + Sums::row(i)] = product_with_a;
        }
    }
}

}  // namespace r1kernels::moe
