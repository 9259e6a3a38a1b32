// The CUDA launchers of grpo_loss and group_advantages under the emulator, for pytest. A call comes as a dict with the
// names of the fields of R1kernelsGrpo and R1kernelsAdvantages; addresses as integers (Tensor.data_ptr()).
#include <nanobind/nanobind.h>

#include "grpo/cuda_sm80.cu"
#include "grpo/cuda_sm80_advantages.cu"

namespace nb = nanobind;

namespace {

void* current_stream = nullptr;

template <class Pointer>
Pointer address(const nb::dict& fields, const char* name) {
    return reinterpret_cast<Pointer>(nb::cast<uintptr_t>(fields[name]));
}

template <class Integer>
Integer whole(const nb::dict& fields, const char* name) {
    return nb::cast<Integer>(fields[name]);
}

R1kernelsGrpo grpo_call(const nb::dict& fields) {
    R1kernelsGrpo call = {};
    for (auto [name, to] : {std::pair{"sequences", &call.sequences}, {"width", &call.width}, {"tokens", &call.tokens}}) {
        *to = whole<int64_t>(fields, name);
    }
    for (auto [name, to] : {std::pair{"mask_bytes", &call.mask_bytes},
                            {"cu_seqlens_bytes", &call.cu_seqlens_bytes},
                            {"advantages_per_token", &call.advantages_per_token},
                            {"policy_weights_per_token", &call.policy_weights_per_token},
                            {"variant", &call.variant},
                            {"ratio", &call.ratio},
                            {"kl", &call.kl},
                            {"count", &call.count}}) {
        *to = whole<int32_t>(fields, name);
    }
    call.mask = address<const void*>(fields, "mask");
    call.cu_seqlens = address<const void*>(fields, "cu_seqlens");
    for (auto [name, to] : {std::pair{"logp", &call.logp},
                            {"old_logp", &call.old_logp},
                            {"ref_logp", &call.ref_logp},
                            {"advantages", &call.advantages},
                            {"policy_weights", &call.policy_weights},
                            {"entropy", &call.entropy},
                            {"entropy_weights", &call.entropy_weights},
                            {"weights", &call.weights},
                            {"total", &call.total}}) {
        *to = address<const float*>(fields, name);
    }
    call.numbers = *address<const R1kernelsGrpoNumbers*>(fields, "numbers");
    for (auto [name, to] : {std::pair{"grad_logp", &call.grad_logp},
                            {"grad_of_ratio", &call.grad_of_ratio},
                            {"grad_entropy", &call.grad_entropy},
                            {"loss", &call.loss},
                            {"metrics", &call.metrics}}) {
        *to = address<float*>(fields, name);
    }
    return call;
}

int forward(const nb::dict& fields) {
    const R1kernelsGrpo call = grpo_call(fields);
    return r1kernels_grpo_loss_cuda(&call, address<void*>(fields, "workspace"), current_stream);
}

int backward(const nb::dict& fields, uintptr_t grad_loss, uintptr_t to_logp, uintptr_t to_entropy) {
    R1kernelsGrpo call = grpo_call(fields);
    return r1kernels_grpo_loss_cuda_backward(&call, reinterpret_cast<const float*>(grad_loss), call.grad_of_ratio,
                                             call.grad_logp, call.grad_entropy, reinterpret_cast<float*>(to_logp),
                                             reinterpret_cast<float*>(to_entropy), current_stream);
}

size_t workspace_bytes(const nb::dict& fields) {
    const R1kernelsGrpo call = grpo_call(fields);
    return r1kernels_grpo_loss_cuda_workspace(&call);
}

int advantages(const nb::dict& fields) {
    R1kernelsAdvantages call = {};
    call.size = whole<int64_t>(fields, "size");
    call.rewards = address<const float*>(fields, "rewards");
    call.group_ids = address<const int64_t*>(fields, "group_ids");
    call.group_size = whole<int64_t>(fields, "group_size");
    call.valid = address<const bool*>(fields, "valid");
    call.scale = whole<int32_t>(fields, "scale");
    call.leave_one_out = whole<int32_t>(fields, "leave_one_out");
    call.eps = nb::cast<double>(fields["eps"]);
    call.advantages = address<float*>(fields, "advantages");
    return r1kernels_group_advantages_cuda(&call, nullptr);
}

}  // namespace

NB_MODULE(grpo_loss, m) {
    m.def("set_seed", &emulator::set_seed);
    // streams are numbers; launches and memsets are those since the last question
    m.def("set_stream", [](uintptr_t stream) { current_stream = reinterpret_cast<void*>(stream); });
    m.def("set_capture", [](bool on) {
        emulated_capture = on ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    });
    m.def("launches_and_memsets", [] {
        return nb::make_tuple(std::exchange(emulated_launches, 0), std::exchange(emulated_memsets, 0));
    });
    m.def("counter_of", [](uintptr_t stream) { return r1kernels::counter_of(reinterpret_cast<void*>(stream)); });
    m.def("counters", [] {
        char* bytes = reinterpret_cast<char*>(r1kernels::stream_counters);
        const nb::object view = nb::steal(PyMemoryView_FromMemory(bytes, sizeof(r1kernels::stream_counters), PyBUF_WRITE));
        return view.attr("cast")("I");
    });
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("workspace_bytes", &workspace_bytes);
    m.def("advantages", &advantages);
}
