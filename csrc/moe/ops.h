// What the torch ops of the MoE family share: checks on all devices, and on the CPU products over all experts.
// Schemas and fakes stand beside the public functions in r1kernels/moe; the shapes are explained there.
// T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows, R rank of a low-rank
// addition.
#pragma once

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "moe/cpu.h"

namespace r1kernels {

// --- tensors ---

// A contiguous tensor of these sizes.
inline void check(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
    STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, ": wrong number of dimensions");
    int64_t dim = 0;
    for (int64_t size : sizes) {
        STD_TORCH_CHECK(tensor.size(dim) == size, name, ": expected size ", size, " at dimension ", dim, ", got ",
                        tensor.size(dim));
        ++dim;
    }
}

template <typename T>
T* data_of(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

inline void check_on(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype,
                     std::initializer_list<int64_t> sizes) {
    check(name, tensor, dtype, sizes);
    STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected a tensor on the device of the first argument");
}

inline char* at_element(const Tensor& tensor, int64_t element) {
    return data_of<char>(tensor) + element * static_cast<int64_t>(tensor.element_size());
}

// Logits, K and what the weights are made of; neither choice nor replay.
inline R1kernelsRoute router_of(const Tensor& logits, int64_t top_k, int64_t score, bool normalize, double eps,
                                double scale) {
    R1kernelsRoute call = {};
    call.element = element_of("logits", logits);
    check("logits", logits, logits.scalar_type(), {logits.size(0), logits.size(1)});
    STD_TORCH_CHECK(top_k >= 1 && logits.size(1) >= 1, "top_k, logits: expected K >= 1 and E >= 1");
    call.logits = logits.data_ptr();
    call.tokens = logits.size(0);
    call.experts = logits.size(1);
    call.top_k = top_k;
    call.n_group = call.topk_group = 1;
    STD_TORCH_CHECK(score >= 0 && score <= 2, "score: expected 0, 1 or 2, got ", score);
    call.score = static_cast<Score>(score);
    call.normalize = normalize;
    call.eps = eps;
    call.scale = scale;
    return call;
}

using Choose = void (*)(const R1kernelsRoute& call, const Tensor& logits, float* weights, int64_t* indices,
                        int32_t* counts);

// The op, by what a device has to run.
template <Choose choose>
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, int64_t top_k, int64_t score, bool normalize, double eps,
                                         double scale, bool by_logits, const std::optional<Tensor>& bias,
                                         int64_t n_group, int64_t topk_group, bool two_best,
                                         const std::optional<Tensor>& replayed) {
    R1kernelsRoute call = router_of(logits, top_k, score, normalize, eps, scale);
    call.by_logits = by_logits;
    call.two_best = two_best;
    if (replayed) {
        check_on("indices", *replayed, logits, ScalarType::Long, {call.tokens, call.top_k});
        call.replayed = data_of<int64_t>(*replayed);
    } else {
        STD_TORCH_CHECK(n_group >= 1 && call.experts % n_group == 0 && topk_group >= 1 && topk_group <= n_group,
                        "n_group, topk_group: expected a divisor of E and at most n_group");
        const int64_t eligible = topk_group * (call.experts / n_group);
        STD_TORCH_CHECK(call.top_k <= eligible, "top_k: expected at most the ", eligible, " eligible experts, got ",
                        call.top_k);
        call.n_group = n_group;
        call.topk_group = topk_group;
    }
    if (bias) {
        check_on("bias", *bias, logits, ScalarType::Float, {call.experts});
        call.bias = data_of<float>(*bias);
    }
    const Tensor weights = empty_on(logits, {call.tokens, top_k}, ScalarType::Float);
    const Tensor indices = empty_on(logits, {call.tokens, top_k}, ScalarType::Long);
    const Tensor counts = empty_on(logits, {call.experts}, ScalarType::Int);
    choose(call, logits, data_of<float>(weights), data_of<int64_t>(indices), data_of<int32_t>(counts));
    return {weights, indices, counts};
}

inline Gating gating_of(int64_t activation, double alpha, double limit, double shift) {
    STD_TORCH_CHECK(activation == 0 || activation == 1, "activation: expected 0 or 1, got ", activation);
    return {static_cast<Activation>(activation), static_cast<float>(alpha), static_cast<float>(limit),
            static_cast<float>(shift)};
}

// The low-rank matrices of moe_experts; one that is not there adds nothing.
struct Lora {
    const std::optional<Tensor>&up_a, &up_b, &down_a, &down_b;  // (E, R, H), (E, 2 I, R), (E, R, I), (E, H, R)
    float scale;

    Lora(const std::optional<Tensor>& up_a, const std::optional<Tensor>& up_b, const std::optional<Tensor>& down_a,
         const std::optional<Tensor>& down_b, double scale, const Tensor& x, const Tensor& gate_up, const Tensor& down)
        : up_a(up_a), up_b(up_b), down_a(down_a), down_b(down_b), scale(static_cast<float>(scale)) {
        check_pair("up_a", up_a, "up_b", up_b, x, gate_up);
        check_pair("down_a", down_a, "down_b", down_b, x, down);
    }

private:
    static void check_pair(const char* a_name, const std::optional<Tensor>& a, const char* b_name,
                           const std::optional<Tensor>& b, const Tensor& x, const Tensor& weight) {
        STD_TORCH_CHECK(a.has_value() == b.has_value(), a_name, ", ", b_name, ": expected both or neither");
        if (!a) return;
        STD_TORCH_CHECK(a->dim() == 3 && a->size(1) > 0, a_name, ": expected three dimensions, none of them empty");
        check_on(a_name, *a, x, x.scalar_type(), {weight.size(0), a->size(1), weight.size(2)});
        check_on(b_name, *b, x, x.scalar_type(), {weight.size(0), weight.size(1), a->size(1)});
    }
};

// Those of hidden, weights, gate_up and down, and the four of a low-rank addition, or none without one.
using ExpertsGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

// The four of a low-rank addition; one that is not needed, or whose matrix is not there, has no element.
template <typename Make>
std::vector<Tensor> gradients_of(const Lora& lora, const std::array<bool, 4>& needed, const Make& make) {
    std::vector<Tensor> gradients;
    if (!lora.up_a && !lora.down_a) return gradients;
    const std::optional<Tensor>* matrices[] = {&lora.up_a, &lora.up_b, &lora.down_a, &lora.down_b};
    for (int i = 0; i < 4; ++i) {
        const std::optional<Tensor>& of = *matrices[i];
        gradients.push_back(of ? make({needed[i] ? of->size(0) : 0, of->size(1), of->size(2)}) : make({0}));
    }
    return gradients;
}

// --- products over all experts on the CPU (ops_gemm.cpp) ---

// Rows [row, row + rows) in expert order, all of one expert, or of a weight, and columns [column, column + columns).
struct Block {
    int64_t expert, row, rows, column, columns;
};

// The rows of each expert in nearly equal parts of at most kMoeBlockRows, times the columns in parts.
std::vector<Block> blocks_of(const int32_t* offsets, int64_t experts, int64_t columns, int64_t block_columns);

// A matrix of S rows in expert order.
struct ExpertRows {
    const Tensor& values;
    const int32_t* index;  // the row of `values` for each row in expert order, or null for the same

    BlockRows at(int64_t row, int64_t column) const {
        const int64_t stride = values.size(1);
        if (index) return {at_element(values, column), stride, index + row};
        return {at_element(values, row * stride + column), stride, nullptr};
    }
};

enum class Transposed { no, yes };

// The first element that takes part of the matrix of an expert, from column `first` of the product on.
inline int64_t place_in(const Tensor& weight, Transposed transposed, int64_t expert, int64_t first) {
    const int64_t stride = weight.size(2);
    return expert * weight.size(1) * stride + (transposed == Transposed::yes ? first * stride : first);
}

// Rows (S, R) in expert order and the weight they are multiplied with, to be added to the sums of a product whose weight lies
// the same way; null: nothing.
struct LowRank {
    const Tensor* rows = nullptr;
    const Tensor* weight = nullptr;

    LowRankBlock at(Transposed transposed, const Block& block, int64_t first) const {
        if (!rows) return {};
        const int64_t rank = rows->size(1);
        return {at_element(*rows, block.row * rank),
                at_element(*weight, place_in(*weight, transposed, block.expert, first)), weight->size(2), rank};
    }
};

// out (S, columns of the weight from `column` on) = x weight[e]^T or, not transposed, x weight[e]; weight (E, N, K).
struct Product {
    Transposed transposed;
    ExpertRows x;
    const Tensor& weight;
    const int32_t* offsets;
    int64_t column, columns;
    void* out;
    bool float_out = false;
    bool batch_invariant = false;  // the bits of a row of x weight[e]^T do not depend on how many rows an expert has
    float scale = 1.0f;            // of the sums
    LowRank low = {};
};

void grouped_product(const Product& product);

// grad (E, M, N): grad[e] = a^T b over the rows of e; zeros for an expert without rows.
void grouped_weight_gradient(const ExpertRows& a, const ExpertRows& b, const int32_t* offsets, const Tensor& grad);

// Writes offsets (E + 1), permutation (S) and inverse (S): a stable counting sort; the sentinel E comes last.
template <typename Integer>
void sort_rows(const int64_t* indices, int64_t rows, int64_t experts, int32_t* offsets, Integer* permutation,
               Integer* inverse) {
    std::vector<int64_t> next(experts + 2, 0);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t expert = indices[row];
        STD_TORCH_CHECK(expert >= 0 && expert <= experts, "indices: expected values in [0, ", experts, ") or ", experts,
                        ", got ", expert, " at position ", row);
        ++next[expert + 1];
    }
    for (int64_t expert = 0; expert < experts; ++expert) next[expert + 1] += next[expert];
    for (int64_t expert = 0; expert <= experts; ++expert) offsets[expert] = static_cast<int32_t>(next[expert]);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t place = next[indices[row]]++;
        permutation[place] = static_cast<Integer>(row);
        inverse[row] = static_cast<Integer>(place);
    }
}

}  // namespace r1kernels
