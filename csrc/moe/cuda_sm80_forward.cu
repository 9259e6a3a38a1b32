// Launchers of the grouped products of the forward, for every architecture from sm_80 on.
#include "moe/cuda_products.cuh"

namespace r1kernels::moe {

int launch_transposed(const R1kernelsMoeProduct& product, void* stream) {
    return with_scalar(product.element, [&](auto zero) {
        return launch_rows<decltype(zero), true, R1KERNELS_MOE_STORE>(product, stream);
    });
}

int launch_up(const R1kernelsMoeProduct& product, void* stream) {
    return with_scalar(product.element, [&](auto zero) {
        return launch_rows<decltype(zero), true, R1KERNELS_MOE_UP>(product, stream);
    });
}

}  // namespace r1kernels::moe
