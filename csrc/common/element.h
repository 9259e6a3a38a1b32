// The types of elements that kernels of every family and device are called with.
#pragma once

#include <cstdint>

namespace r1kernels {

enum class Element : int32_t { float32, bfloat16, float16 };

}  // namespace r1kernels
