// Launchers of the gradients of the weights on Hopper.
#include "moe/cuda_sm90a_launch.cuh"
#include "moe/cuda_sm90a_weights.cuh"

namespace r1kernels::moe::hopper {
namespace {

template <class Scalar>
auto kernel_of(const R1kernelsMoeWeightProduct& product) {
    if (product.left.index != nullptr) return hopper_weights_kernel<Scalar, true, false>;
    if (product.right.index != nullptr) return hopper_weights_kernel<Scalar, false, true>;
    return hopper_weights_kernel<Scalar, false, false>;
}

}  // namespace
}  // namespace r1kernels::moe::hopper

extern "C" int r1kernels_moe_hopper_serves_weights(const R1kernelsMoeWeightProduct* product) {
    return r1kernels::moe::hopper::serves(*product);
}

extern "C" int r1kernels_moe_hopper_weight_product_cuda(const R1kernelsMoeWeightProduct* product, void* stream) {
    using namespace r1kernels;
    using namespace r1kernels::moe::hopper;
    const WeightPlan plan = plan_of(*product, current_device().processors);
    if (plan.tiles > INT32_MAX) return cudaErrorInvalidValue;  // no memory holds as much
    WeightCall call = {};
    call.product = *product;
    call.m_tiles = static_cast<int>(plan.m_tiles);
    call.n_tiles = static_cast<int>(plan.n_tiles);
    call.tiles = static_cast<int>(plan.tiles);
    if (product->left.index == nullptr) {
        if (const cudaError_t code = encode(plan.left, product->element, &call.left); code != cudaSuccess) return code;
    }
    if (product->right.index == nullptr) {
        if (const cudaError_t code = encode(plan.right, product->element, &call.right); code != cudaSuccess) return code;
    }
    return launch(product->element == Element::float16 ? kernel_of<__half>(*product) : kernel_of<__nv_bfloat16>(*product),
                  plan.blocks, kThreads, kSharedBytes, stream, call);
}
