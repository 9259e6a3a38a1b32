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

// run(the mode as a constant)
template <class Run>
int with_mode(bool general, bool entropy, Run run) {
    if (general) return run(ModeConstant<Mode::kGeneral>());
    if (entropy) return run(ModeConstant<Mode::kEntropy>());
    return run(ModeConstant<Mode::kLogp>());
}

}  // namespace r1kernels::logprob
