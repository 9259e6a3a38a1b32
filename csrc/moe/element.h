// What the MoE kernels of every device name alike.
#pragma once

#include <cstdint>

namespace r1kernels {

enum class Element : int32_t { float32, bfloat16, float16 };
enum class Activation : int32_t { silu, gelu_tanh };

}  // namespace r1kernels
