// Tensor cores and asynchronous copies for the emulator: what csrc/common/mma.cuh calls on the host.
#pragma once

#include <cstdint>

namespace emulator {

void load_matrices(uint32_t (&values)[4], const void* row, bool transposed);

// Of __half and __nv_bfloat16.
template <class Scalar>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Of a warp of Hopper: one product after another, in float32.
void add_product(float (&sums)[16][256], const float (&a)[64][16], const float (&b)[64][256]);

}  // namespace emulator
