// What the torch ops of kept rows of the head share on all devices. Schemas and fakes: r1kernels/logprob/kept_head.py.
#pragma once

#include "logprob/ops.h"

namespace r1kernels {

inline const int64_t* indices(const char* name, const Tensor& tensor, int64_t count, const Tensor& hidden) {
    return row_values<int64_t>(name, tensor, ScalarType::Long, count, hidden);
}

inline R1kernelsKeptProducts kept_call_of(const Tensor& hidden, const Tensor& weight, const Tensor& ids,
                                          const Tensor& tokens, int64_t first) {
    STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                    "hidden, weight: expected shapes (N, H) and (V, H)");
    STD_TORCH_CHECK(hidden.is_contiguous() && weight.is_contiguous() && weight.device() == hidden.device() &&
                        weight.scalar_type() == hidden.scalar_type(),
                    "hidden, weight: expected contiguous tensors of one dtype on one device");
    R1kernelsKeptProducts call = {};
    call.hidden = hidden.data_ptr();
    call.weight = weight.data_ptr();
    call.element = element_of("hidden", hidden);
    call.tokens = hidden.size(0);
    call.width = hidden.size(1);
    call.vocabulary = weight.size(0);
    call.first = first;
    call.entries = ids.numel();
    call.ids = indices("ids", ids, call.entries, hidden);
    call.entry_tokens = indices("tokens", tokens, call.entries, hidden);
    return call;
}

// The call of a backward.
inline R1kernelsKeptProducts kept_backward_of(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                              const Tensor& ids, const Tensor& tokens, const Tensor& offsets,
                                              const Tensor& order, int64_t first) {
    R1kernelsKeptProducts call = kept_call_of(hidden, weight, ids, tokens, first);
    call.offsets = indices("offsets", offsets, call.tokens + 1, hidden);
    call.order = indices("order", order, call.entries, hidden);
    call.grad = row_values<float>("grad", grad, ScalarType::Float, call.entries, hidden);
    return call;
}

}  // namespace r1kernels
