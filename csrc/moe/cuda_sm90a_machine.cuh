// What the Hopper kernels ask of the machine: barriers in shared memory, the copy engine, registers, and wgmma through
// CuTe. Tests run the kernels on a host with another header of this name.
#pragma once

#include <cuda.h>  // CUtensorMap

#include <cute/tensor.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "moe/hopper_plan.h"

namespace r1kernels::moe::hopper {

using TensorMap = CUtensorMap;

// --- barriers ---

using Barrier = uint64_t;
using cutlass::arch::ClusterBarrier;
using cutlass::arch::ClusterTransactionBarrier;

__device__ inline void barrier_init(Barrier* barrier, int arrivals) { ClusterBarrier::init(barrier, arrivals); }
// After barrier_init, before the barrier at which other threads and the copy engine may use it.
__device__ inline void barriers_ready() { cutlass::arch::fence_barrier_init(); }
__device__ inline void barrier_arrive(Barrier* barrier) { ClusterBarrier::arrive(barrier); }
__device__ inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
    ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
}
__device__ inline void barrier_wait(Barrier* barrier, uint32_t parity) { ClusterBarrier::wait(barrier, parity); }

// --- copies into shared memory ---

// The box at element (c0, c1, c2); its bytes complete on `barrier`.
__device__ inline void load_box(const TensorMap& map, Barrier* barrier, unsigned char* to, int c0, int c1, int c2) {
    const auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    cute::SM90_TMA_LOAD_3D::copy(&map, barrier, hint, to, c0, c1, c2);
}

// What this thread wrote into shared memory becomes visible to wgmma, which reads it through another proxy.
__device__ inline void show_to_wgmma() { cutlass::arch::fence_view_async_shared(); }

// --- registers a thread, of whole warpgroups ---

template <int kCount>
__device__ inline void registers_give() {
    cutlass::arch::warpgroup_reg_dealloc<kCount>();
}
template <int kCount>
__device__ inline void registers_take() {
    cutlass::arch::warpgroup_reg_alloc<kCount>();
}

// --- wgmma ---

template <class Scalar>
using CutlassScalar = std::conditional_t<std::is_same_v<Scalar, __half>, cute::half_t, cute::bfloat16_t>;

// The layout of an operand's stages: k_major_offset, mn_major_offset.
template <class Element, bool kMnMajor, int kSize>
__host__ __device__ constexpr auto stages_layout() {
    using namespace cute;
    using Shape = Shape<Int<kSize>, Int<kBlockK>, Int<kStages>>;
    if constexpr (kMnMajor) {
        return tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{}, Shape{}, cute::Step<_2, _1, _3>{});
    } else {
        return tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape{}, cute::Step<_1, _2, _3>{});
    }
}

// The accumulators of a consumer thread. Number 4 j + 2 h + i of thread t of 256 is row
// t / 32 * 16 + t % 32 / 4 + 8 h and column 8 j + t % 4 * 2 + i of the tile.
template <class Scalar, bool kMnMajorA, bool kMnMajorB>
struct Multiplier {
    using Element = CutlassScalar<Scalar>;
    static constexpr cute::GMMA::Major kMajorA = kMnMajorA ? cute::GMMA::Major::MN : cute::GMMA::Major::K;
    static constexpr cute::GMMA::Major kMajorB = kMnMajorB ? cute::GMMA::Major::MN : cute::GMMA::Major::K;
    using Atom = std::conditional_t<std::is_same_v<Scalar, __half>,
                                    cute::SM90_64x256x16_F32F16F16_SS<kMajorA, kMajorB>,
                                    cute::SM90_64x256x16_F32BF16BF16_SS<kMajorA, kMajorB>>;
    using Mma = decltype(cute::make_tiled_mma(Atom{}, cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
    using Accumulators =
        decltype(cute::partition_fragment_C(Mma{}, cute::Shape<cute::Int<kBlockM>, cute::Int<kBlockN>>{}));
    static_assert(decltype(cute::size(Accumulators{}))::value == kBlockM * kBlockN / (32 * kConsumerWarps));

    Accumulators accumulators;

    __device__ float operator[](int i) const { return accumulators(i); }
    __device__ void clear() { cute::clear(accumulators); }

    // Starts to add the product of a stage, or to set it where it is the first.
    __device__ void start(unsigned char* a, unsigned char* b, int stage, bool first, int thread) {
        using namespace cute;
        const auto all_a = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(a)),
                                       stages_layout<Element, kMnMajorA, kBlockM>());
        const auto all_b = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(b)),
                                       stages_layout<Element, kMnMajorB, kBlockN>());
        Mma mma;
        const auto part = mma.get_slice(thread);
        const auto fragment_a = part.make_fragment_A(part.partition_A(all_a));
        const auto fragment_b = part.make_fragment_B(part.partition_B(all_b));
        warpgroup_fence_operand(accumulators);
        warpgroup_arrive();
        mma.accumulate_ = first ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
        CUTE_UNROLL
        for (int k = 0; k < size<2>(fragment_a); ++k) {
            gemm(mma, fragment_a(_, _, k, stage), fragment_b(_, _, k, stage), accumulators);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    }

    // Waits until at most kPending products that were started are under way.
    template <int kPending>
    __device__ void wait() {
        cute::warpgroup_wait<kPending>();
        cute::warpgroup_fence_operand(accumulators);
    }
};

}  // namespace r1kernels::moe::hopper
