// The CUDA launchers of the router and of sort_by_expert under the emulator, for pytest. Addresses come as integers
// (Tensor.data_ptr()).
#include <nanobind/nanobind.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <utility>

#include "common/block_reduce.cuh"
#include "common/elements.cuh"
#include "common/launch.cuh"

// Counts the exponentials of float64 that the kernels of the router compute.
static int64_t wide_exps = 0;
static double counted_exp(double x) {
    ++wide_exps;
    return std::exp(x);
}

#define exp counted_exp
#include "moe/cuda_sm80_route.cu"
#undef exp
#include "moe/cuda_sm80_sort.cu"

namespace nb = nanobind;

namespace {

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Device memory holds anything before it is written.
struct Workspace {
    explicit Workspace(size_t bytes) : memory(new (std::align_val_t(16)) char[bytes]) {
        memset(memory.get(), 0xA5, bytes);
    }
    struct Free {
        void operator()(char* bytes) const { ::operator delete[](bytes, std::align_val_t(16)); }
    };
    std::unique_ptr<char[], Free> memory;
};

int sort(uintptr_t indices, int64_t rows, int64_t experts, bool wide, uintptr_t offsets, uintptr_t permutation,
         uintptr_t inverse) {
    const R1kernelsExpertSort call = {at<const int64_t>(indices), rows,  experts, wide, at<int32_t>(offsets),
                                      at<void>(permutation), at<void>(inverse)};
    const Workspace workspace(r1kernels_expert_sort_cuda_workspace(&call));
    return r1kernels_expert_sort_cuda(&call, workspace.memory.get(), nullptr);
}

R1kernelsRoute router(int element, uintptr_t logits, int64_t tokens, int64_t experts, int64_t top_k, int score,
                      bool normalize, double eps, double scale) {
    R1kernelsRoute call = {};
    call.element = static_cast<r1kernels::Element>(element);
    call.logits = at<const void>(logits);
    call.tokens = tokens;
    call.experts = experts;
    call.top_k = top_k;
    call.n_group = call.topk_group = 1;
    call.score = static_cast<r1kernels::Score>(score);
    call.normalize = normalize;
    call.eps = eps;
    call.scale = scale;
    return call;
}

int route(R1kernelsRoute call, bool by_logits, int64_t n_group, int64_t topk_group, bool two_best, uintptr_t bias,
          uintptr_t replayed, uintptr_t weights, uintptr_t indices, uintptr_t counts) {
    call.by_logits = by_logits;
    call.two_best = two_best;
    call.n_group = n_group;
    call.topk_group = topk_group;
    call.bias = at<const float>(bias);
    call.replayed = at<const int64_t>(replayed);
    return r1kernels_route_cuda(&call, at<float>(weights), at<int64_t>(indices), at<int32_t>(counts), nullptr);
}

int route_backward(const R1kernelsRoute& call, uintptr_t indices, uintptr_t grad_weights, uintptr_t grad_logits) {
    return r1kernels_route_cuda_backward(&call, at<const int64_t>(indices), at<const float>(grad_weights),
                                         at<void>(grad_logits), nullptr);
}

}  // namespace

NB_MODULE(moe_routing, module) {
    module.def("set_seed", &emulator::set_seed);
    module.def("set_max_blocks", [](unsigned blocks) { emulator::max_blocks = blocks; });
    nb::class_<R1kernelsRoute>(module, "Router").def(nb::new_(&router));
    module.def("wide_exps", [] { return std::exchange(wide_exps, 0); });
    module.def("route", &route);
    module.def("route_backward", &route_backward);
    module.def("sort", &sort);
}
