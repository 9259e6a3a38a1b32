// The torch ops of the MoE family: they check what the kernels trust, allocate, and share the blocks out.
// Schemas and fakes stand in r1kernels/moe/ops.py; the shapes are explained there.
#include "moe/host_experts.h"

namespace r1kernels {

namespace {

// --- sort_by_expert, grouped_gemm ---

std::tuple<Tensor, Tensor, Tensor> sort_cpu(const Tensor& indices, int64_t experts) {
    const int64_t rows = indices.numel();
    check("indices", indices, ScalarType::Long, {rows});
    STD_TORCH_CHECK(rows <= INT32_MAX, "indices: expected less than 2^31 entries, got ", rows);
    const Tensor offsets = empty_on(indices, {experts + 1}, ScalarType::Int);
    const Tensor permutation = empty_on(indices, {rows}, ScalarType::Long);
    const Tensor inverse = empty_on(indices, {rows}, ScalarType::Long);
    sort_rows(data_of<int64_t>(indices), rows, experts, data_of<int32_t>(offsets), data_of<int64_t>(permutation),
              data_of<int64_t>(inverse));
    return {offsets, permutation, inverse};
}

const int32_t* checked_offsets(const Tensor& offsets, const Tensor& x, const Tensor& weight) {
    element_of("x", x);
    const int64_t rows = x.size(0), experts = weight.size(0);
    check("weight", weight, x.scalar_type(), {experts, weight.size(1), weight.size(2)});
    check("offsets", offsets, ScalarType::Int, {experts + 1});
    STD_TORCH_CHECK(experts > 0 && weight.size(1) > 0 && weight.size(2) > 0, "weight: expected no empty size");
    const int32_t* values = data_of<int32_t>(offsets);
    STD_TORCH_CHECK(values[0] == 0, "offsets: expected 0 at position 0, got ", values[0]);
    for (int64_t expert = 0; expert < experts; ++expert) {
        STD_TORCH_CHECK(values[expert + 1] >= values[expert] && values[expert + 1] <= rows,
                        "offsets: expected ascending values in [0, ", rows, "], got ", values[expert + 1],
                        " at position ", expert + 1);
    }
    return values;
}

// Rows behind the last expert are nobody's: zeros.
void clear_rest(const Tensor& rows, int64_t first) {
    memset(at_element(rows, first * rows.size(1)), 0, (rows.size(0) - first) * rows.size(1) * rows.element_size());
}

Tensor grouped_gemm_cpu(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
    const int32_t* bounds = checked_offsets(offsets, x, weight);
    check("x", x, x.scalar_type(), {x.size(0), weight.size(2)});
    const Tensor out = kept_on(x, {x.size(0), weight.size(1)}, x.scalar_type());
    grouped_product(Transposed::yes, {x, nullptr}, weight, bounds, 0, weight.size(1), out.data_ptr(), false);
    clear_rest(out, bounds[weight.size(0)]);
    return out;
}

std::tuple<Tensor, Tensor> grouped_gemm_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                     const Tensor& offsets, bool need_x, bool need_weight) {
    const int32_t* bounds = checked_offsets(offsets, x, weight);
    const int64_t rows = x.size(0), experts = weight.size(0), m = weight.size(1), n = weight.size(2);
    check("x", x, x.scalar_type(), {rows, n});
    check("grad", grad, x.scalar_type(), {rows, m});
    const Tensor grad_x = kept_on(x, {need_x ? rows : 0, n}, x.scalar_type());
    const Tensor grad_weight = kept_on(x, {need_weight ? experts : 0, m, n}, x.scalar_type());
    if (need_x) {
        grouped_product(Transposed::no, {grad, nullptr}, weight, bounds, 0, n, grad_x.data_ptr(), false);
        clear_rest(grad_x, bounds[experts]);
    }
    if (need_weight) grouped_weight_gradient({grad, nullptr}, {x, nullptr}, bounds, grad_weight);
    return {grad_x, grad_weight};
}

// --- route ---

// Tokens are shared out in items: of at least as many tokens, and at most as many of them.
constexpr int64_t kRouteTokens = 64, kRouteItems = 256;

MoeRouter router_of(const Tensor& logits, int64_t top_k, bool softmax, bool normalize, double scale) {
    MoeRouter call = {};
    call.element = element_of("logits", logits);
    check("logits", logits, logits.scalar_type(), {logits.size(0), logits.size(1)});
    STD_TORCH_CHECK(top_k >= 1 && logits.size(1) >= 1, "top_k, logits: expected K >= 1 and E >= 1");
    call.logits = logits.data_ptr();
    call.experts = logits.size(1);
    call.top_k = top_k;
    call.softmax = softmax;
    call.normalize = normalize;
    call.scale = scale;
    return call;
}

void check_choice(const MoeRouter& call, const int64_t* indices, int64_t tokens) {
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
int64_t share_tokens(const MoeRouter& call, int64_t tokens, const Run& run) {
    const int64_t size = std::max(kRouteTokens, (tokens + kRouteItems - 1) / kRouteItems);
    const int64_t items = (tokens + size - 1) / size;
    share(items, tokens * call.experts * 16, router_scratch(call.experts, call.top_k),
          [&](int64_t item, void* scratch) {
              run(item, scratch, item * size, std::min((item + 1) * size, tokens));
          });
    return items;
}

std::tuple<Tensor, Tensor, Tensor> route_cpu(const Tensor& logits, int64_t top_k, bool softmax,
                                             const std::optional<Tensor>& bias, int64_t n_group, int64_t topk_group,
                                             bool normalize, double scale, const std::optional<Tensor>& replayed) {
    MoeRouter call = router_of(logits, top_k, softmax, normalize, scale);
    const int64_t tokens = logits.size(0);
    STD_TORCH_CHECK(n_group >= 1 && call.experts % n_group == 0 && topk_group >= 1 && topk_group <= n_group,
                    "n_group, topk_group: expected a divisor of E and at most n_group");
    STD_TORCH_CHECK(replayed || top_k <= topk_group * (call.experts / n_group), "top_k: expected at most the ",
                    topk_group * (call.experts / n_group), " eligible experts, got ", top_k);
    call.n_group = n_group;
    call.topk_group = topk_group;
    if (bias) {
        check("bias", *bias, ScalarType::Float, {call.experts});
        call.bias = data_of<float>(*bias);
    }
    const Tensor weights = empty_on(logits, {tokens, top_k}, ScalarType::Float);
    const Tensor indices = empty_on(logits, {tokens, top_k}, ScalarType::Long);
    const Tensor counts = empty_on(logits, {call.experts}, ScalarType::Int);
    int64_t* chosen = data_of<int64_t>(indices);
    if (replayed) {
        check("indices", *replayed, ScalarType::Long, {tokens, top_k});
        memcpy(chosen, replayed->data_ptr(), tokens * top_k * sizeof(int64_t));
        check_choice(call, chosen, tokens);
    }
    const MoeKernels& kernels = chosen_moe_kernels();
    std::vector<int32_t> item_counts(std::min(tokens / kRouteTokens + 1, kRouteItems) * call.experts, 0);
    const int64_t items = share_tokens(call, tokens, [&](int64_t item, void* scratch, int64_t begin, int64_t end) {
        kernels.route(call, replayed.has_value(), chosen, data_of<float>(weights), scratch, begin, end);
        int32_t* count = item_counts.data() + item * call.experts;
        for (int64_t i = begin * top_k; i < end * top_k; ++i) ++count[chosen[i]];
    });
    int32_t* count = data_of<int32_t>(counts);
    memset(count, 0, call.experts * sizeof(int32_t));
    for (int64_t item = 0; item < items; ++item) {
        for (int64_t expert = 0; expert < call.experts; ++expert) {
            count[expert] += item_counts[item * call.experts + expert];
        }
    }
    return {weights, indices, counts};
}

Tensor route_backward_cpu(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices, bool softmax,
                          bool normalize, double scale) {
    const int64_t tokens = logits.size(0), top_k = indices.size(1);
    const MoeRouter call = router_of(logits, top_k, softmax, normalize, scale);
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
    library.impl("sort_by_expert_cpu", TORCH_BOX(&sort_cpu));
    library.impl("grouped_gemm_cpu", TORCH_BOX(&grouped_gemm_cpu));
    library.impl("grouped_gemm_cpu_backward", TORCH_BOX(&grouped_gemm_backward_cpu));
    library.impl("moe_experts_cpu", TORCH_BOX(&experts_forward));
    library.impl("moe_experts_cpu_backward", TORCH_BOX(&experts_backward));
    library.impl("route_cpu", TORCH_BOX(&route_cpu));
    library.impl("route_cpu_backward", TORCH_BOX(&route_backward_cpu));
}

}  // namespace

}  // namespace r1kernels
