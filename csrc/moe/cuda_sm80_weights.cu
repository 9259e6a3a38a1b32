// Launcher of the gradient of the weights, and the choice among the products over rows.
#include "moe/cuda.h"
#include "moe/cuda_products.cuh"

using namespace r1kernels;
using namespace r1kernels::moe;

int r1kernels_moe_product_cuda(const R1kernelsMoeProduct* product, void* stream) {
    switch (product->epilogue) {
        case R1KERNELS_MOE_UP: return launch_up(*product, stream);
        case R1KERNELS_MOE_GATE_BACKWARD: return launch_gate_backward(*product, stream);
        default: return product->transposed ? launch_transposed(*product, stream) : launch_plain(*product, stream);
    }
}

int r1kernels_moe_weight_product_cuda(const R1kernelsMoeWeightProduct* product, void* stream) {
    return with_scalar(product->element,
                       [=](auto zero) { return launch_weights<decltype(zero)>(*product, stream); });
}
