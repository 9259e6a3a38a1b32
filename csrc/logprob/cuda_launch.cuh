// What the launchers of the log-prob kernels share.
#pragma once

#include <type_traits>

#include "common/launch.cuh"
#include "logprob/cuda_rows.cuh"

namespace r1kernels::logprob {

template <Mode kMode>
using ModeConstant = std::integral_constant<Mode, kMode>;

inline bool is_transformed(const R1kernelsTokenLogprobs& call) {
    return call.bias != nullptr || call.logit_scale != 1.0f || call.softcap != 0.0f;
}

// run(a value of the scalar type that `dtype` names)
template <class Run>
int with_scalar(int32_t dtype, Run run) {
    switch (dtype) {
        case R1KERNELS_FLOAT32: return run(float{});
        case R1KERNELS_FLOAT16: return run(__half{});
        case R1KERNELS_BFLOAT16: return run(__nv_bfloat16{});
        default: return cudaErrorInvalidValue;
    }
}

// run(the mode as a constant)
template <class Run>
int with_mode(bool general, bool entropy, Run run) {
    if (general) return run(ModeConstant<Mode::kGeneral>());
    if (entropy) return run(ModeConstant<Mode::kEntropy>());
    return run(ModeConstant<Mode::kLogp>());
}

}  // namespace r1kernels::logprob
