// Small kernels with known mistakes: each shows that the emulator notices one kind.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "common/block_reduce.cuh"
#include "common/elements.cuh"
#include "common/launch.cuh"

namespace {

using Floats = std::vector<float>;
using r1kernels::launch;
using r1kernels::shared_memory;

enum Mistake { kNone, kNoBarrier, kEarlyReturn, kTwoPlaces, kHalfWarp, kPastTheEnd, kMixedOperations };

// out[i] = in[last - i], through shared memory.
__global__ void reverse(const float* in, float* out, Mistake mistake) {
    float* staged = reinterpret_cast<float*>(shared_memory);
    const unsigned i = threadIdx.x, last = blockDim.x - 1;
    staged[i] = in[i];
    if (mistake == kEarlyReturn && i > 40) return;
    if (mistake == kPastTheEnd) staged[i + 1] = in[i];
    if (mistake == kTwoPlaces && i % 2 == 0) {
        __syncthreads();
    } else if (mistake != kNoBarrier) {
        __syncthreads();
    }
    out[i] = staged[last - i];
}

// out[i] = the sum of the warp of thread i.
__global__ void warp_sum(const float* in, float* out, Mistake mistake) {
    float sum = in[threadIdx.x];
    if (mistake == kHalfWarp && threadIdx.x % 32 >= 16) return;
    if (mistake == kMixedOperations && threadIdx.x % 2 == 0) __syncwarp();
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    out[threadIdx.x] = sum;
}

__global__ void uninitialised(const float*, float* out, Mistake) {
    out[threadIdx.x] = reinterpret_cast<float*>(shared_memory)[threadIdx.x];
}

// out = in, four at a time, though `out` may lie anywhere.
__global__ void copy_chunks(const float* in, float* out, Mistake) {
    if (threadIdx.x % 4 == 0) r1kernels::load_chunk(in, threadIdx.x, blockDim.x).store(out + threadIdx.x);
}

// out[block] = how many blocks came before it.
__global__ void arrival(float* counter, float* out) {
    if (threadIdx.x == 0) out[blockIdx.x] = atomicAdd(counter, 1.0f);
}

// out[i] = the sum over the block plus the largest value, by the reduction of csrc/common, twice in a row.
__global__ void block_sum_and_max(const float* in, float* out, Mistake) {
    const float sum = r1kernels::block_reduce(in[threadIdx.x], [](float a, float b) { return a + b; });
    const float largest = r1kernels::block_reduce(in[threadIdx.x], [](float a, float b) { return a > b ? a : b; });
    out[threadIdx.x] = sum + largest;
}

// out[i] bit j = whether in[j] of the warp is above 0.
__global__ void ballot(const float* in, float* out, Mistake) {
    const unsigned bits = __ballot_sync(0xffffffffu, in[threadIdx.x] > 0.0f);
    out[threadIdx.x] = static_cast<float>(__popc(bits) + 100 * __any_sync(0xffffffffu, in[threadIdx.x] > 0.0f) +
                                          1000 * __all_sync(0xffffffffu, in[threadIdx.x] > 0.0f));
}

Floats run(void (*kernel)(const float*, float*, Mistake), const Floats& in, Mistake mistake, uint64_t seed) {
    Floats out(in.size());
    emulator::set_seed(seed);
    launch(kernel, 1, static_cast<int>(in.size()), in.size() * sizeof(float), nullptr, in.data(), out.data(),
           mistake);
    return out;
}

void copy_to_an_odd_address() {
    alignas(16) float in[32] = {}, out[33];
    launch(copy_chunks, 1, 32, 0, nullptr, in, out + 1, kNone);
}

Floats block_order(int blocks, uint64_t seed) {
    Floats out(blocks);
    float counter = 0;
    emulator::set_seed(seed);
    launch(arrival, blocks, 32, 0, nullptr, &counter, out.data());
    return out;
}

}  // namespace

NB_MODULE(probes, m) {
    nanobind::enum_<Mistake>(m, "Mistake")
        .value("none", kNone)
        .value("no_barrier", kNoBarrier)
        .value("early_return", kEarlyReturn)
        .value("two_places", kTwoPlaces)
        .value("half_warp", kHalfWarp)
        .value("past_the_end", kPastTheEnd)
        .value("mixed_operations", kMixedOperations);
    const auto def = [&](const char* name, void (*kernel)(const float*, float*, Mistake)) {
        m.def(name, [=](const Floats& in, Mistake mistake, uint64_t seed) { return run(kernel, in, mistake, seed); });
    };
    def("reverse", reverse);
    def("warp_sum", warp_sum);
    def("uninitialised", uninitialised);
    def("block_sum_and_max", block_sum_and_max);
    def("ballot", ballot);
    m.def("copy_to_an_odd_address", &copy_to_an_odd_address);
    m.def("block_order", &block_order);
    m.def("launch_after_an_error", [] {
        float counter = 0, order;
        emulated_last_error = cudaErrorInvalidValue;
        return launch(arrival, 1, 32, 0, nullptr, &counter, &order);
    });
    m.def("launch_too_large", [] { return launch(arrival, 1, 2048, 0, nullptr, nullptr, nullptr); });
}
