// The forward kernels of the log-prob ops: one pass over the logits (cuda_sums.cuh: the mathematics).
//
// With S = 1 + S':  logp = (z_y - M) / T - log1p(S'),  entropy = log1p(S') + E' / S.
//
// Floor: N * V * (bytes of a logit) are read once; all else is O(N), and 12 bytes a piece where a row has several. One
// exponential per logit: 16 a clock and multiprocessor, so that in bf16 exponentials alone take about half of the time that
// the bytes take on Hopper. So do instructions: at that rate a logit may cost 12, and 7 (9 with the entropy) are spent.
#pragma once

#include "logprob/cuda_rows.cuh"

namespace r1kernels::logprob {

// Moves the largest of the values to values[0], or NaN if there is one: a knock-out, the losers in the other places.
template <int kSize>
__device__ inline void largest_first(float (&values)[kSize]) {
#pragma unroll
    for (int apart = 1; apart < kSize; apart *= 2) {
#pragma unroll
        for (int i = 0; i + apart < kSize; i += 2 * apart) {
            const float a = values[i], b = values[i + apart];
            values[i] = max_or_nan(a, b);
            values[i + apart] = fminf(a, b);
        }
    }
}

// The sums of a warp's share of the piece logits[0 .. length), which begins at column `begin` of the row.
// `chosen` is the logit of the target, in column `target`: what `earlier` counts against.
template <class Scalar, Mode kMode>
__device__ inline Sums sums_of_piece(const R1kernelsTokenLogprobs& call, const Scalar* logits, int64_t begin,
                                     int length, const Team& team, float bits, int64_t target, float chosen) {
    constexpr int kSize = Chunk<Scalar>::kSize;
    constexpr bool kGeneral = kMode == Mode::kGeneral;
    const int stride = team.threads * kSize;
    LaneSums lane;
    float others[2] = {}, spread[2] = {};  // two of each: an addition need not wait for the one before
    for (int start = 0; start < length; start += kUnroll * stride) {
        Chunk<Scalar> chunks[kUnroll];
        load_chunks(logits, start + team.rank * kSize, stride, length, from_float<Scalar>(-INFINITY), chunks);
        float z[kUnroll][kSize];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
#pragma unroll
            for (int i = 0; i < kSize; ++i) z[j][i] = chunks[j][i];
            if constexpr (kGeneral) {
                const int first = start + j * stride + team.rank * kSize;
                float biases[kSize];
                load_biases(call, begin, first, length, biases);
#pragma unroll
                for (int i = 0; i < kSize; ++i) {
                    const bool inside = first + i < length;
                    z[j][i] = inside ? logit_of(call, z[j][i], biases[i]).value : -INFINITY;
                    lane.total += inside ? z[j][i] : 0.0f;
                    lane.earlier += begin + first + i < target && z[j][i] >= chosen ? 1.0f : 0.0f;
                }
            }
            largest_first(z[j]);
            const float smaller = fminf(lane.largest, z[j][0]);
            lane.largest = max_or_nan(lane.largest, z[j][0]);
            z[j][0] = smaller;
        }
        // all lanes share one reference: a new largest logit turns up in few rounds of a warp, in many of some lane
        if (__any_sync(kWholeWarp, !(lane.largest <= lane.reference))) {
            lane.others = others[0] + others[1];
            lane.spread = spread[0] + spread[1];
            lane.refer_to<kGeneral>(warp_max(lane.largest), bits);
            others[0] = lane.others;
            spread[0] = lane.spread;
            others[1] = spread[1] = 0.0f;
        }
        const float origin = lane.origin();
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
            if (start + j * stride >= length) break;
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
                const float distance = (origin - z[j][i]) * bits;
                const float weight = exp2_fast(-distance);
                others[i % 2] += weight;
                if constexpr (kMode != Mode::kLogp) spread[i % 2] += weight * fminf(distance, kFarBits);
                if constexpr (kGeneral) lane.squares += weight * weight;
            }
        }
    }
    lane.others = others[0] + others[1];
    lane.spread = spread[0] + spread[1];
    return merge_lanes<kGeneral>(lane, bits);
}

// The sums of a block from those of its warps, in the first warp. Every thread of the block calls it.
template <bool kExtra>
__device__ inline Sums merge_warps(const Sums& sums, float bits) {
    Sums* of_warp = reinterpret_cast<Sums*>(shared_memory);
    __syncthreads();  // whoever used the shared memory before has read it
    if (lane_id() == 0) of_warp[threadIdx.x / kWarpSize] = sums;
    __syncthreads();
    if (threadIdx.x >= kWarpSize) return {};
    return merge_lanes<kExtra>(LaneSums(threadIdx.x < kWarps ? of_warp[threadIdx.x] : Sums()), bits);
}

// The outputs of a row, by one thread. Of a slab they are parts, for the caller to merge.
template <class Scalar>
__device__ inline void write_row(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobOutputs& to,
                                 const Row& row, int64_t rows, Sums sums) {
    const bool slab = call.vocabulary != call.whole;
    float logp = 0.0f, entropy = 0.0f, log_sum_sq_probs = 0.0f, mean_logits = 0.0f, is_top1 = 0.0f;
    if (row.ignored) {
        sums = Sums();
        sums.largest = 0.0f;
    } else {
        float chosen = NAN;
        if (row.has_target(call)) {
            const int64_t column = row.column(call);
            chosen = to_float(static_cast<const Scalar*>(call.logits)[row.offset + column]);
            chosen = logit_of(call, chosen, call.bias == nullptr ? 0.0f : call.bias[column]).value;
        }
        // NaN, +inf, no logit above -inf (a slab may be empty), or no temperature: nothing to normalise by
        const bool finite = fabsf(sums.largest) < INFINITY || (slab && sums.largest == -INFINITY);
        if (!finite || row.inverse_temperature != row.inverse_temperature) sums.others = NAN;
        sums.spread *= kLn2;

        const float log_normaliser = log1pf(sums.others), normaliser = 1.0f + sums.others;
        logp = slab ? chosen : (chosen - sums.largest) * row.inverse_temperature - log_normaliser;
        entropy = row.valid ? log_normaliser + sums.spread / normaliser : NAN;
        log_sum_sq_probs = log1pf(sums.squares) - 2.0f * log_normaliser;
        mean_logits = sums.total * row.inverse_temperature / call.vocabulary;
        is_top1 = chosen == sums.largest && sums.earlier == 0.0f ? 1.0f : 0.0f;
    }
    to.logp[row.number] = logp;
    if (to.entropy != nullptr) to.entropy[row.number] = entropy;
    to.stats[row.number] = sums.largest;
    to.stats[rows + row.number] = sums.others;
    to.stats[2 * rows + row.number] = to.with_entropy ? sums.spread : 0.0f;
    if (to.extra != nullptr) {
        to.extra[row.number] = log_sum_sq_probs;
        to.extra[rows + row.number] = mean_logits;
        to.extra[2 * rows + row.number] = is_top1;
    }
}

// parts (fields, rows * pieces): the sums of pieces, where a row has several; merge_kernel then writes the outputs.
template <class Scalar, Mode kMode>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(kMode))
    forward_kernel(R1kernelsTokenLogprobs call, R1kernelsLogprobOutputs to, Partition partition, float* parts) {
    constexpr bool kGeneral = kMode == Mode::kGeneral;
    const Team team(partition);
    const int64_t items = partition.rows * partition.pieces;
    for (int64_t item = team.first; item < items; item += team.step) {
        const Row row(call, item / partition.pieces);
        const int64_t begin = item % partition.pieces * kPiece;
        Sums sums;
        if (!row.ignored) {
            const Scalar* logits = static_cast<const Scalar*>(call.logits) + row.offset;
            const int length = piece_length(begin, call.vocabulary);
            float chosen = NAN;
            if (kGeneral && to.extra != nullptr && row.has_target(call)) {
                const int64_t column = row.column(call);
                const float bias = call.bias == nullptr ? 0.0f : call.bias[column];
                chosen = logit_of(call, to_float(logits[column]), bias).value;
            }
            sums = sums_of_piece<Scalar, kMode>(call, logits + begin, begin, length, team, row.bits(),
                                                row.column(call), chosen);
            if (partition.warps > 1) sums = merge_warps<kGeneral>(sums, row.bits());
        }
        if (team.rank != 0) continue;
        if (partition.pieces == 1) {
            write_row<Scalar>(call, to, row, partition.rows, sums);
            continue;
        }
        parts[item] = sums.largest;
        parts[items + item] = sums.others;
        parts[2 * items + item] = sums.spread;
        if (kGeneral && to.extra != nullptr) {
            parts[3 * items + item] = sums.squares;
            parts[4 * items + item] = sums.total;
            parts[5 * items + item] = sums.earlier;
        }
    }
}

// Merges the pieces of each row and writes its outputs: one warp per row, a piece a lane.
template <class Scalar>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(R1kernelsTokenLogprobs call, R1kernelsLogprobOutputs to, Partition partition, const float* parts) {
    const int64_t items = partition.rows * partition.pieces;
    const int64_t warps = int64_t{gridDim.x} * kWarps;
    for (int64_t number = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize; number < partition.rows;
         number += warps) {
        const Row row(call, number);
        Sums sums;
        // the first lane carries what was merged so far
        for (int start = 0; start < partition.pieces && !row.ignored; start += kWarpSize - 1) {
            const int piece = start + lane_id() - 1;
            const int64_t item = number * partition.pieces + piece;
            Sums part;
            if (lane_id() == 0) {
                part = sums;
            } else if (piece < partition.pieces) {
                part.largest = parts[item];
                part.others = parts[items + item];
                part.spread = parts[2 * items + item];
                if (to.extra != nullptr) {
                    part.squares = parts[3 * items + item];
                    part.total = parts[4 * items + item];
                    part.earlier = parts[5 * items + item];
                }
            }
            sums = merge_lanes<true>(LaneSums(part), row.bits());
        }
        if (lane_id() == 0) write_row<Scalar>(call, to, row, partition.rows, sums);
    }
}

}  // namespace r1kernels::logprob
