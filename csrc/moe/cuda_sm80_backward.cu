// Launchers of the grouped products over rows of the backward, for every architecture from sm_80 on.
#include "moe/cuda_products.cuh"

namespace r1kernels::moe {

int launch_plain(const R1kernelsMoeProduct& product, void* stream) {
    return with_scalar(product.element, [&](auto zero) {
        return launch_rows<decltype(zero), false, R1KERNELS_MOE_STORE>(product, stream);
    });
}

int launch_gate_backward(const R1kernelsMoeProduct& product, void* stream) {
    return with_scalar(product.element, [&](auto zero) {
        return launch_rows<decltype(zero), false, R1KERNELS_MOE_GATE_BACKWARD>(product, stream);
    });
}

}  // namespace r1kernels::moe
