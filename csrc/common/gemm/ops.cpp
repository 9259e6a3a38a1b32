// The torch op gemm_bf16_cpu; its schema stands in r1kernels/logprob/cpu.py.
#include "common/gemm/bf16.h"

#include "common/memory.h"
#include "common/share.h"
#include "common/stable.h"

namespace r1kernels {

namespace {

using torch::stable::parallel_for;

bool is_float32(const char* name, const Tensor& tensor) {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name,
                    ": expected bfloat16 or float32");
    STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
    return dtype == ScalarType::Float;
}

// A thread's packed panels of B, kept between calls: a fresh buffer is paid in page faults.
uint32_t* packed_words(int64_t words) {
    thread_local AlignedBytes buffer;
    thread_local int64_t size = 0;
    if (size < words) {
        buffer = aligned_bytes(words * sizeof(uint32_t));
        size = words;
        want_huge_pages(buffer.get(), words * sizeof(uint32_t));
    }
    return reinterpret_cast<uint32_t*>(buffer.get());
}

void gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& out, bool add) {
    const GemmKernels& kernels = chosen_gemm_kernels();
    STD_TORCH_CHECK(kernels.multiply, "gemm_bf16_cpu: this processor multiplies no bfloat16");
    Gemm gemm = {};
    gemm.a_is_float32 = is_float32("a", a);
    gemm.b_is_float32 = is_float32("b", b);
    STD_TORCH_CHECK(is_float32("out", out), "out: expected float32");
    gemm.m = a.size(0), gemm.k = a.size(1), gemm.n = b.size(1);
    STD_TORCH_CHECK(b.size(0) == gemm.k && out.size(0) == gemm.m && out.size(1) == gemm.n,
                    "gemm_bf16_cpu: expected shapes (m, k), (k, n), (m, n)");
    STD_TORCH_CHECK(gemm.n <= 1 || out.stride(1) == 1, "out: expected stride 1 on n, got ", out.stride(1));
    if (gemm.m == 0 || gemm.n == 0) return;
    gemm.a = a.data_ptr(), gemm.b = b.data_ptr(), gemm.c = static_cast<float*>(out.data_ptr());
    gemm.a_row_stride = a.stride(0), gemm.a_k_stride = a.stride(1);
    gemm.b_k_stride = b.stride(0), gemm.b_column_stride = b.stride(1);
    gemm.c_stride = out.stride(0);
    gemm.add = add;
    gemm.packed_b = packed_words(gemm_b_words(gemm));
    const int64_t panel_grain = kGrain / (kGemmPanelColumns * gemm.k + 1) + 1;
    parallel_for(0, gemm_b_panels(gemm), panel_grain,
                 [&](int64_t begin, int64_t end) { kernels.pack_b(gemm, begin, end); });
    // a product costs less than an element of the row kernels
    const int64_t block_grain = 16 * kGrain / (kGemmBlockRows * gemm.k * gemm.n / 16 + 1) + 1;
    parallel_for(0, gemm_a_blocks(gemm), block_grain, [&](int64_t begin, int64_t end) {
        kernels.multiply(gemm, static_cast<uint32_t*>(thread_workspace(kGemmAWords * sizeof(uint32_t))), begin, end);
    });
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) { library.impl("gemm_bf16_cpu", TORCH_BOX(&gemm_bf16)); }

}  // namespace

}  // namespace r1kernels
