// The torch ops of kept rows of the head on the CPU: they share entries, tokens and rows out.
#include "logprob/ops_kept.h"

#include <cstring>

#include "common/kept.h"
#include "common/share.h"
#include "logprob/cpu.h"

namespace r1kernels {

namespace {

using torch::stable::parallel_for;

// How many items of so many multiply-adds are worth a thread.
int64_t items_of(int64_t work) { return kWorkOfThread / (work + 1) + 1; }

Tensor products(const Tensor& hidden, const Tensor& weight, const Optional& bias, const Tensor& ids,
                const Tensor& tokens, int64_t first) {
    R1kernelsKeptProducts call = kept_call_of(hidden, weight, ids, tokens, first);
    call.bias = optional_values<float>("bias", bias, ScalarType::Float, call.vocabulary, hidden);
    const Tensor result = empty_on(hidden, {call.entries}, ScalarType::Float);
    const KeptKernels& kernels = chosen_kept_kernels();
    parallel_for(0, call.entries, items_of(call.width), [&](int64_t begin, int64_t end) {
        kernels.products(call, floats(result), begin, end);
    });
    return result;
}

void fill_with_zeros(const Tensor& tensor, int64_t rows) {
    if (!tensor.numel()) return;
    const int64_t bytes = tensor.numel() / rows * static_cast<int64_t>(aoti_torch_dtype_element_size(number_of(tensor.scalar_type())));
    char* data = static_cast<char*>(tensor.data_ptr());
    parallel_for(0, rows, items_of(bytes / 8), [&](int64_t begin, int64_t end) {
        memset(data + begin * bytes, 0, (end - begin) * bytes);
    });
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& ids, const Tensor& tokens,
    const Tensor& offsets, const Tensor& order, int64_t first, bool slab, bool need_hidden, bool need_weight,
    bool need_bias) {
    const R1kernelsKeptProducts call = kept_backward_of(grad, hidden, weight, ids, tokens, offsets, order, first);
    const KeptKernels& kernels = chosen_kept_kernels();
    const int64_t work = call.width * (call.entries / (call.tokens + 1) + 1);
    const ScalarType dtype = hidden.scalar_type();
    Tensor for_hidden = empty_on(hidden, {0}, slab ? ScalarType::Float : dtype);
    Tensor for_weight = empty_on(hidden, {0}, dtype), for_bias = empty_on(hidden, {0}, ScalarType::Float);
    if (need_hidden) {
        for_hidden = kept_on(hidden, {call.tokens, call.width}, for_hidden.scalar_type());
        parallel_for(0, call.tokens, items_of(work), [&](int64_t begin, int64_t end) {
            kernels.gradient_of_hidden(call, for_hidden.data_ptr(), slab, begin, end);
        });
    }
    if (need_weight) {
        for_weight = kept_on(hidden, {call.vocabulary, call.width}, dtype);
        fill_with_zeros(for_weight, call.vocabulary);
    }
    if (need_bias) {
        for_bias = empty_on(hidden, {call.vocabulary}, ScalarType::Float);
        fill_with_zeros(for_bias, call.vocabulary);
    }
    if (need_weight || need_bias) {
        void* rows = need_weight ? for_weight.data_ptr() : nullptr;
        float* sums = need_bias ? floats(for_bias) : nullptr;
        parallel_for(0, call.entries, items_of(call.width), [&](int64_t begin, int64_t end) {
            kernels.gradient_of_weight(call, rows, sums, begin, end);
        });
    }
    return {for_hidden, for_weight, for_bias};
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("kept_products_cpu", TORCH_BOX(&products));
    library.impl("kept_products_cpu_backward", TORCH_BOX(&backward));
}

}  // namespace

}  // namespace r1kernels
