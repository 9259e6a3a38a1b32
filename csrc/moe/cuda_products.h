// The kinds of grouped products over rows, each compiled in a file of its own.
#pragma once

#include "moe/cuda.h"

namespace r1kernels::moe {

int launch_transposed(const R1kernelsMoeProduct& product, void* stream);
int launch_up(const R1kernelsMoeProduct& product, void* stream);
int launch_plain(const R1kernelsMoeProduct& product, void* stream);
int launch_gate_backward(const R1kernelsMoeProduct& product, void* stream);

}  // namespace r1kernels::moe
