// grouped_gemm and moe_experts on CUDA, their kernels, launchers and order of launches, under the emulator, for pytest.
// Addresses come as integers (Tensor.data_ptr()), 0 for what is not needed.
#include <nanobind/nanobind.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "moe/cuda_experts.h"
#include "moe/cuda_sm80_backward.cu"
#include "moe/cuda_sm80_forward.cu"
#include "moe/cuda_sm80_sort.cu"
#include "moe/cuda_sm80_sums.cu"
#include "moe/cuda_sm80_weights.cu"

namespace nb = nanobind;

namespace {

// Memory of the workspace: NaN before it is written, and a canary on either side of it.
class Memory {
public:
    explicit Memory(int64_t bytes) : bytes_(bytes), buffer_(bytes + 2 * kPad, kCanary) {
        std::memset(data_ptr(), 0xFF, bytes);
    }
    void* data_ptr() const { return const_cast<unsigned char*>(buffer_.data()) + kPad; }
    bool kept() const {
        const auto whole = [](auto begin, auto end) { return std::count(begin, end, kCanary) == end - begin; };
        return whole(buffer_.begin(), buffer_.begin() + kPad) && whole(buffer_.begin() + kPad + bytes_, buffer_.end());
    }

private:
    static constexpr size_t kPad = 256;
    static constexpr unsigned char kCanary = 0xA5;
    int64_t bytes_;
    std::vector<unsigned char> buffer_;
};

class Host {
public:
    void* const stream = nullptr;

    struct Owner {
        std::shared_ptr<Memory> memory;
        void* data_ptr() const { return memory->data_ptr(); }
    };

    Owner allocate(int64_t bytes) {
        memories_.push_back(std::make_shared<Memory>(bytes));
        return {memories_.back()};
    }

    void check(int code) const {
        if (code != 0) throw std::runtime_error(cudaGetErrorString(static_cast<cudaError_t>(code)));
    }

    void finish() const {
        for (const auto& memory : memories_) {
            if (!memory->kept()) throw std::runtime_error("write outside the workspace");
        }
    }

private:
    std::vector<std::shared_ptr<Memory>> memories_;
};

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct Gemm : CudaGroupedGemm {
    Gemm(int element, int64_t rows, int64_t experts, int64_t outputs, int64_t inputs, bool transposed, uintptr_t x,
         uintptr_t weight, uintptr_t offsets)
        : CudaGroupedGemm{static_cast<Element>(element), rows,         experts,          outputs, inputs,
                          transposed,                    at<void>(x), at<void>(weight), at<int32_t>(offsets)} {}
};

struct Experts : CudaExperts {
    Experts(int element, int activation, float alpha, float limit, float shift, int64_t tokens, int64_t hidden, int64_t intermediate, int64_t experts,
            int64_t top_k, uintptr_t x, uintptr_t weights, uintptr_t gate_up, uintptr_t down, uintptr_t offsets,
            uintptr_t permutation, uintptr_t inverse, uintptr_t up_a, uintptr_t up_b, int64_t up_rank, uintptr_t down_a,
            uintptr_t down_b, int64_t down_rank, float scale)
        : CudaExperts{static_cast<Element>(element),
                      {static_cast<Activation>(activation), alpha, limit, shift},
                      tokens,
                      hidden,
                      intermediate,
                      experts,
                      top_k,
                      at<void>(x),
                      at<float>(weights),
                      at<void>(gate_up),
                      at<void>(down),
                      at<int32_t>(offsets),
                      at<int32_t>(permutation),
                      at<int32_t>(inverse),
                      {at<void>(up_a), at<void>(up_b), up_rank},
                      {at<void>(down_a), at<void>(down_b), down_rank},
                      scale} {}
};

void gemm_forward(const Gemm& call, uintptr_t out) {
    Host host;
    run_forward(host, call, at<void>(out));
    host.finish();
}

void gemm_backward(const Gemm& call, uintptr_t grad, uintptr_t grad_x, uintptr_t grad_weight) {
    Host host;
    run_backward(host, call, at<void>(grad), at<void>(grad_x), at<void>(grad_weight));
    host.finish();
}

void experts_forward(const Experts& call, uintptr_t indices, uintptr_t pre_activation, uintptr_t out) {
    Host host;
    run_forward(host, call, at<int64_t>(indices), at<void>(pre_activation), at<void>(out));
    host.finish();
}

void experts_backward(const Experts& call, uintptr_t grad, uintptr_t kept, uintptr_t hidden, uintptr_t weights,
                      uintptr_t gate_up, uintptr_t down, uintptr_t up_a, uintptr_t up_b, uintptr_t down_a,
                      uintptr_t down_b) {
    Host host;
    run_backward(host, call, at<void>(grad), at<void>(kept),
                 {at<void>(hidden), at<float>(weights), at<void>(gate_up), at<void>(down), at<void>(up_a),
                  at<void>(up_b), at<void>(down_a), at<void>(down_b)});
    host.finish();
}

// (expert, first, end) of each tile and the bounds of the experts.
nb::tuple schedule(int element, int64_t rows, int64_t experts, uintptr_t offsets) {
    Host host;
    const Schedule<Host> made(host, static_cast<Element>(element), rows, experts, at<int32_t>(offsets));
    host.finish();
    nb::list tiles, bounds;
    for (int64_t i = 0; i < (*made).tile_count; ++i) {
        const R1kernelsMoeTile& tile = (*made).tiles[i];
        tiles.append(nb::make_tuple(tile.expert, tile.first, tile.end));
    }
    for (int64_t i = 0; i < experts + 2; ++i) bounds.append((*made).bounds[i]);
    return nb::make_tuple((*made).tile_rows, tiles, bounds);
}

}  // namespace

NB_MODULE(moe_experts, m) {
    nb::class_<Gemm>(m, "Gemm")
        .def(nb::init<int, int64_t, int64_t, int64_t, int64_t, bool, uintptr_t, uintptr_t, uintptr_t>());
    nb::class_<Experts>(m, "Experts")
        .def(nb::init<int, int, float, float, float, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, uintptr_t,
                      uintptr_t, int64_t, float>());
    m.def("set_seed", &emulator::set_seed);
    m.def("gemm_forward", &gemm_forward);
    m.def("gemm_backward", &gemm_backward);
    m.def("experts_forward", &experts_forward);
    m.def("experts_backward", &experts_backward);
    m.def("schedule", &schedule);
}
