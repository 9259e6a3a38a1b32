// Launchers of the products with rows on Hopper.
#include "moe/cuda_sm90a_launch.cuh"
#include "moe/cuda_sm90a_rows.cuh"

extern "C" int r1kernels_moe_hopper_serves(const R1kernelsMoeProduct* product) {
    return r1kernels::moe::hopper::serves(*product);
}

extern "C" int r1kernels_moe_hopper_product_cuda(const R1kernelsMoeProduct* product, void* stream) {
    using namespace r1kernels;
    using namespace r1kernels::moe::hopper;
    if (product->schedule.rows == 0) return cudaSuccess;
    const RowPlan plan = plan_of(*product, current_device().processors);
    if (plan.tiles > INT32_MAX) return cudaErrorInvalidValue;  // no memory holds as much
    RowCall call = {};
    call.product = *product;
    call.column_tiles = static_cast<int>(plan.column_tiles);
    call.tiles = static_cast<int>(plan.tiles);
    const bool gathered = product->x.index != nullptr;  // such rows have another shape, and no box of them is asked for
    if (const cudaError_t code = gathered ? cudaSuccess : encode(plan.x, product->element, &call.x);
        code != cudaSuccess) {
        return code;
    }
    if (const cudaError_t code = encode(plan.weight, product->element, &call.weight); code != cudaSuccess) return code;
    const auto kernel = product->element == Element::float16 ? row_kernel_of<__half>(*product)
                                                             : row_kernel_of<__nv_bfloat16>(*product);
    return launch(kernel, plan.blocks, kThreads, kSharedBytes, stream, call);
}
