// Launchers of the products with rows on Hopper.
#include "moe/cuda_sm90a_launch.cuh"
#include "moe/cuda_sm90a_rows.cuh"

namespace r1kernels::moe::hopper {
namespace {

template <class Scalar>
auto kernel_of(const R1kernelsMoeProduct& product) {
    switch (product.epilogue) {
        case R1KERNELS_MOE_UP: return hopper_rows_kernel<Scalar, R1KERNELS_MOE_UP, false>;
        case R1KERNELS_MOE_GATE_BACKWARD: return hopper_rows_kernel<Scalar, R1KERNELS_MOE_GATE_BACKWARD, true>;
        default:
            return product.transposed ? hopper_rows_kernel<Scalar, R1KERNELS_MOE_STORE, false>
                                      : hopper_rows_kernel<Scalar, R1KERNELS_MOE_STORE, true>;
    }
}

}  // namespace
}  // namespace r1kernels::moe::hopper

extern "C" int r1kernels_moe_hopper_serves(const R1kernelsMoeProduct* product) {
    using namespace r1kernels::moe::hopper;
    return takes(*product) && current_device().is_hopper && encode_tiled() != nullptr;
}

extern "C" int r1kernels_moe_hopper_product_cuda(const R1kernelsMoeProduct* product, void* stream) {
    using namespace r1kernels;
    using namespace r1kernels::moe::hopper;
    if (product->schedule.rows == 0) return cudaSuccess;
    const RowPlan plan = plan_of(*product, current_device().processors);
    RowCall call = {};
    call.product = *product;
    call.column_tiles = plan.column_tiles;
    call.tiles = plan.tiles;
    const bool gathered = product->x.index != nullptr;  // such rows have another shape, and no box of them is asked for
    if (const cudaError_t code = gathered ? cudaSuccess : encode(plan.x, product->element, &call.x);
        code != cudaSuccess) {
        return code;
    }
    if (const cudaError_t code = encode(plan.weight, product->element, &call.weight); code != cudaSuccess) return code;
    return launch(product->element == Element::float16 ? kernel_of<__half>(*product) : kernel_of<__nv_bfloat16>(*product),
                  plan.blocks, kThreads, kSharedBytes, stream, call);
}
