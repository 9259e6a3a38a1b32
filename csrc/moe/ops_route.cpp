// The torch op route on the CPU.
#include "moe/ops.h"

#include <algorithm>

#include "common/kept.h"
#include "common/share.h"

namespace r1kernels {

namespace {

// Tokens are shared out in items: of at least as many tokens, and at most as many of them.
constexpr int64_t kRouteTokens = 64, kRouteItems = 256;

void check_choice(const R1kernelsRoute& call, const int64_t* indices, int64_t tokens) {
    // found without a branch, in vectors, first: i or E - 1 - i has its highest bit set
    const uint64_t last = static_cast<uint64_t>(call.experts - 1);
    uint64_t bits = 0;
    for (int64_t i = 0; i < tokens * call.top_k; ++i) {
        const uint64_t index = static_cast<uint64_t>(indices[i]);
        bits |= index | (last - index);
    }
    for (int64_t i = 0; bits >> 63 && i < tokens * call.top_k; ++i) {
        STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < call.experts, "indices: expected values in [0, ", call.experts,
                        "), got ", indices[i], " at position ", i);
    }
}

// Calls run(item, scratch, first token, last token) for all items; returns how many there are.
template <typename Run>
int64_t share_tokens(const R1kernelsRoute& call, int64_t tokens, const Run& run) {
    const int64_t size = std::max(kRouteTokens, (tokens + kRouteItems - 1) / kRouteItems);
    const int64_t items = (tokens + size - 1) / size;
    share(items, tokens * call.experts * 16, router_scratch(call.experts, call.top_k),
          [&](int64_t item, void* scratch) {
              run(item, scratch, item * size, std::min((item + 1) * size, tokens));
          });
    return items;
}

void choose(const R1kernelsRoute& call, const Tensor&, float* weights, int64_t* chosen, int32_t* count) {
    const int64_t tokens = call.tokens, top_k = call.top_k;
    if (call.replayed) {
        memcpy(chosen, call.replayed, tokens * top_k * sizeof(int64_t));
        check_choice(call, chosen, tokens);
    }
    const MoeKernels& kernels = chosen_moe_kernels();
    std::vector<int32_t> item_counts(std::min(tokens / kRouteTokens + 1, kRouteItems) * call.experts, 0);
    const int64_t items = share_tokens(call, tokens, [&](int64_t item, void* scratch, int64_t begin, int64_t end) {
        kernels.route(call, chosen, weights, scratch, begin, end);
        int32_t* of_item = item_counts.data() + item * call.experts;
        for (int64_t i = begin * top_k; i < end * top_k; ++i) ++of_item[chosen[i]];
    });
    memset(count, 0, call.experts * sizeof(int32_t));
    for (int64_t item = 0; item < items; ++item) {
        for (int64_t expert = 0; expert < call.experts; ++expert) {
            count[expert] += item_counts[item * call.experts + expert];
        }
    }
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices, int64_t score,
                      bool normalize, double eps, double scale) {
    const int64_t tokens = logits.size(0), top_k = indices.size(1);
    const R1kernelsRoute call = router_of(logits, top_k, score, normalize, eps, scale);
    check("grad_weights", grad_weights, ScalarType::Float, {tokens, top_k});
    check("indices", indices, ScalarType::Long, {tokens, top_k});
    check_choice(call, data_of<int64_t>(indices), tokens);
    const Tensor grad = kept_on(logits, {tokens, call.experts}, logits.scalar_type());
    const MoeKernels& kernels = chosen_moe_kernels();
    share_tokens(call, tokens, [&](int64_t, void* scratch, int64_t begin, int64_t end) {
        kernels.route_backward(call, data_of<int64_t>(indices), data_of<float>(grad_weights), grad.data_ptr(), scratch,
                               begin, end);
    });
    return grad;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("route_cpu", TORCH_BOX(&route<choose>));
    library.impl("route_cpu_backward", TORCH_BOX(&route_backward));
}

}  // namespace

}  // namespace r1kernels
