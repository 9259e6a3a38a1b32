// The torch ops over completions on CUDA; schemas and fakes stand in r1kernels/logprob/cuda.py.
#include <optional>

#include "common/stable.h"
#include "logprob/cuda.h"

#ifdef R1KERNELS_CUDA

namespace r1kernels {

namespace {

void check_launch(int code) { STD_TORCH_CHECK(code == 0, "CUDA: ", r1kernels_cuda_error(code)); }

const int64_t* bounds_of(const Tensor& cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Long && cu_seqlens.dim() == 1 &&
                        cu_seqlens.is_contiguous() && cu_seqlens.numel() > 0,
                    "cu_seqlens: expected (B + 1,) contiguous int64 values");
    return static_cast<const int64_t*>(cu_seqlens.data_ptr());
}

Tensor completion_sums(const Tensor& values, const std::optional<Tensor>& cu_seqlens, int64_t completions) {
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 1 && values.is_contiguous(),
                    "values: expected (N,) contiguous float32 values");
    STD_TORCH_CHECK(completions >= 0 && (!cu_seqlens || cu_seqlens->numel() == completions + 1),
                    "completions: expected one less than the bounds, got ", completions);
    const int32_t device = values.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Tensor sums = empty_on(values, {completions}, ScalarType::Float);
    check_launch(r1kernels_completion_sums_cuda(static_cast<const float*>(values.data_ptr()), values.numel(),
                                                cu_seqlens ? bounds_of(*cu_seqlens) : nullptr, completions,
                                                static_cast<float*>(sums.data_ptr()), current_stream(device)));
    return sums;
}

Tensor completion_numbers(const Tensor& cu_seqlens, int64_t tokens) {
    const int32_t device = cu_seqlens.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Tensor numbers = empty_on(cu_seqlens, {tokens}, ScalarType::Int);
    check_launch(r1kernels_completion_numbers_cuda(bounds_of(cu_seqlens), cu_seqlens.numel() - 1, tokens,
                                                   static_cast<int32_t*>(numbers.data_ptr()), current_stream(device)));
    return numbers;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("completion_sums_cuda", TORCH_BOX(&completion_sums));
    library.impl("completion_numbers_cuda", TORCH_BOX(&completion_numbers));
}

}  // namespace

}  // namespace r1kernels

#endif
