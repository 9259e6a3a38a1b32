// Tensor cores and asynchronous copies of sm_80 and later: the instructions by name.
//
// Lanes are numbered 0 to 31; q = lane % 4 and g = lane / 4. A 16-bit matrix of 8 x 8 lies in shared memory as 8 rows of 16
// bytes, anywhere at multiples of 16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace r1kernels {

#ifdef __CUDACC__

// 16 bytes into shared memory: the first `bytes` from `global`, zeros behind them; nothing is read where bytes is 0.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
}

// The copies since the last call become a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the kPending newest groups of this thread are on their way.
template <int kPending>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices; lane 8 i + r names row r of matrix i. values[i] is the pair (2 q, 2 q + 1) of row g of matrix i.
__device__ inline void load_matrices(uint32_t (&values)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_transposed_matrices(uint32_t (&values)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// sums (16 x 8) += a (16 x 16) b (16 x 8) with float32 sums. Of a lane: sums[2 i + j] is row g + 8 i, column 2 q + j;
// a[i] the pair of row g + 8 (i % 2), columns 2 q + 8 (i / 2); b[i] the pair of rows 2 q + 8 i, column g.
template <class Scalar>
__device__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void multiply_add<__half>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else  // the host emulator: see tests/emulator/include/tensor_cores.h

inline void copy_async(void* shared, const void* global, int bytes) { emulator::copy_async(shared, global, bytes); }
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>
void wait_for_copies() {
    emulator::wait_for_copies(kPending);
}
inline void load_matrices(uint32_t (&values)[4], const void* row) { emulator::load_matrices(values, row, false); }
inline void load_transposed_matrices(uint32_t (&values)[4], const void* row) {
    emulator::load_matrices(values, row, true);
}
template <class Scalar>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_add<Scalar>(sums, a, b);
}

#endif

}  // namespace r1kernels
