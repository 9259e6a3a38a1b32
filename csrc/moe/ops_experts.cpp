// The torch op moe_experts on the CPU: the steps of forward and backward.
// T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows, R rank of a low-rank
// addition.
#include "moe/ops.h"

#include <algorithm>

#include "common/kept.h"
#include "common/share.h"

namespace r1kernels {

namespace {

constexpr int64_t kCombineBytes = 8 << 20;  // of float32 rows that wait for their sum at a time

struct Experts {
    Element element;
    Gating gating;
    bool batch_invariant;
    ScalarType dtype;
    int64_t tokens, hidden, intermediate, experts, top_k, rows;
    const Tensor &x, &gate_up, &down;

    Experts(const Tensor& x, const Tensor& weights, const Tensor& gate_up, const Tensor& down, const Gating& gating,
            bool batch_invariant)
        : element(element_of("hidden", x)), gating(gating), batch_invariant(batch_invariant), dtype(x.scalar_type()),
          tokens(x.size(0)), hidden(x.size(1)), intermediate(down.size(2)), experts(down.size(0)),
          top_k(weights.size(1)), rows(tokens * top_k), x(x), gate_up(gate_up), down(down) {
        STD_TORCH_CHECK(hidden > 0 && intermediate > 0 && experts > 0, "hidden, gate_up, down: expected no empty size");
        STD_TORCH_CHECK(rows <= INT32_MAX, "indices: expected less than 2^31 entries, got ", rows);
        check("hidden", x, dtype, {tokens, hidden});
        check("weights", weights, ScalarType::Float, {tokens, top_k});
        check("gate_up", gate_up, dtype, {experts, 2 * intermediate, hidden});
        check("down", down, dtype, {experts, hidden, intermediate});
    }
};

// The order that a forward returned, as a backward gets it: nothing in it may lead out of bounds.
void check_order(const Experts& call, const Tensor& offsets, const Tensor& permutation, const Tensor& inverse) {
    check("offsets", offsets, ScalarType::Int, {call.experts + 1});
    check("permutation", permutation, ScalarType::Int, {call.rows});
    check("inverse", inverse, ScalarType::Int, {call.rows});
    const int32_t* bounds = data_of<int32_t>(offsets);
    bool good = bounds[0] == 0 && bounds[call.experts] <= call.rows;
    for (int64_t expert = 0; expert < call.experts; ++expert) good &= bounds[expert] <= bounds[expert + 1];
    for (const Tensor* places : {&permutation, &inverse}) {
        for (int64_t row = 0; row < call.rows; ++row) {
            const int32_t place = data_of<int32_t>(*places)[row];
            good &= place >= 0 && place < call.rows;
        }
    }
    STD_TORCH_CHECK(good, "offsets, permutation, inverse: expected what the forward returned");
}

std::vector<int32_t> tokens_of(const int32_t* permutation, const Experts& call) {
    std::vector<int32_t> token(call.rows);
    for (int64_t row = 0; row < call.rows; ++row) token[row] = permutation[row] / static_cast<int32_t>(call.top_k);
    return token;
}

// The parts of a block of gate and up that forward and backward share; `rows` are the tokens, or the gradients of the output.
GateBlock gate_block(const Experts& call, const Block& block, const Tensor& rows, const int32_t* token) {
    GateBlock at = {};
    at.element = call.element;
    at.gating = call.gating;
    at.batch_invariant = call.batch_invariant;
    at.rows = block.rows;
    at.columns = block.columns;
    at.hidden = call.hidden;
    at.intermediate = call.intermediate;
    at.tokens = ExpertRows{rows, token}.at(block.row, 0);
    return at;
}

// Up GEMM with gather and activation: `pre_activation` (S, 2 I) where it is kept (else null), `activated` (S, I).
void up_projection(const Experts& call, const int32_t* offsets, const int32_t* token, const Tensor* pre_activation,
                   const Tensor& activated, const LowRank& low) {
    const MoeKernels& kernels = chosen_moe_kernels();
    const std::vector<Block> blocks = blocks_of(offsets, call.experts, call.intermediate, kMoeGateColumns);
    share(blocks.size(), 2 * offsets[call.experts] * call.intermediate * call.hidden, kernels.workspace,
          [&](int64_t item, void* workspace) {
              const Block& block = blocks[item];
              const int64_t gate_row = block.expert * 2 * call.intermediate + block.column;
              GateBlock at = gate_block(call, block, call.x, token);
              at.weight = at_element(call.gate_up, gate_row * call.hidden);
              if (pre_activation) {
                  at.pre_activation = at_element(*pre_activation, block.row * 2 * call.intermediate + block.column);
              }
              at.activated = at_element(activated, block.row * call.intermediate + block.column);
              at.low = low.at(Transposed::yes, block, block.column);
              kernels.up(at, workspace);
          });
}

// scale (x weight[e]^T or x weight[e]) of all columns (S, R) for a low-rank addition.
Tensor low_rows(const Experts& call, Transposed transposed, const ExpertRows& x, const Tensor& weight,
                const int32_t* offsets, float scale) {
    const int64_t rank = weight.size(transposed == Transposed::yes ? 1 : 2);
    const Tensor rows = kept_on(call.x, {call.rows, rank}, call.dtype);
    grouped_product({transposed, x, weight, offsets, 0, rank, rows.data_ptr(), false, call.batch_invariant, scale});
    return rows;
}

// The rows that `second` is multiplied with, x times `first`, where there are such matrices.
class LowProduct {
public:
    LowProduct() = default;
    LowProduct(const Experts& call, Transposed transposed, const ExpertRows& x, const std::optional<Tensor>& first,
               const std::optional<Tensor>& second, const int32_t* offsets, float scale) {
        if (!first) return;
        rows_ = low_rows(call, transposed, x, *first, offsets, scale);
        weight_ = &*second;
    }

    const Tensor& rows() const { return *rows_; }
    operator LowRank() const { return rows_ ? LowRank{&*rows_, weight_} : LowRank{}; }

private:
    std::optional<Tensor> rows_;
    const Tensor* weight_ = nullptr;
};

// out (T, H) = for each token the sum over its rows of weights * (rows weight[e]^T or rows weight[e]).
void product_and_combine(const Experts& call, Transposed transposed, const Tensor& rows, const Tensor& weight,
                         const LowRank& low, const int32_t* offsets, const int32_t* inverse, const float* weights,
                         const Tensor& out) {
    const MoeKernels& kernels = chosen_moe_kernels();
    const int64_t fitting = kCombineBytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(call.rows, 1);
    const int64_t step = std::min(call.hidden, std::max(fitting / kMoeBlockColumns, int64_t{1}) * kMoeBlockColumns);
    const Tensor waiting = kept_on(call.x, {call.rows, step}, ScalarType::Float);
    for (int64_t column = 0; column < call.hidden; column += step) {
        const int64_t columns = std::min(step, call.hidden - column);
        grouped_product({transposed, {rows, nullptr}, weight, offsets, column, columns, waiting.data_ptr(), true,
                         call.batch_invariant, 1.0f, low});
        constexpr int64_t kTokens = 16;
        const int64_t items = (call.tokens + kTokens - 1) / kTokens;
        share(items, call.rows * columns, 0, [&](int64_t item, void*) {
            kernels.combine({call.element, data_of<float>(waiting), columns, inverse, call.top_k, offsets[call.experts],
                             columns, weights, at_element(out, column), call.hidden},
                            item * kTokens, std::min((item + 1) * kTokens, call.tokens));
        });
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> experts_forward(const Tensor& x, const Tensor& indices,
                                                                   const Tensor& weights, const Tensor& gate_up,
                                                                   const Tensor& down, int64_t activation,
                                                                   double alpha, double limit, double shift,
                                                                   bool batch_invariant, bool keep,
                                                                   const std::optional<Tensor>& up_a,
                                                                   const std::optional<Tensor>& up_b,
                                                                   const std::optional<Tensor>& down_a,
                                                                   const std::optional<Tensor>& down_b, double scale) {
    const Experts call(x, weights, gate_up, down, gating_of(activation, alpha, limit, shift), batch_invariant);
    const Lora lora(up_a, up_b, down_a, down_b, scale, x, gate_up, down);
    check("indices", indices, ScalarType::Long, {call.tokens, call.top_k});
    const Tensor out = kept_on(x, {call.tokens, call.hidden}, call.dtype);
    const Tensor pre_activation = kept_on(x, {keep ? call.rows : 0, 2 * call.intermediate}, call.dtype);
    const Tensor offsets = kept_on(x, {call.experts + 1}, ScalarType::Int);
    const Tensor permutation = kept_on(x, {call.rows}, ScalarType::Int);
    const Tensor inverse = kept_on(x, {call.rows}, ScalarType::Int);
    const Tensor activated = kept_on(x, {call.rows, call.intermediate}, call.dtype);
    const int32_t* bounds = data_of<int32_t>(offsets);
    sort_rows(data_of<int64_t>(indices), call.rows, call.experts, data_of<int32_t>(offsets),
              data_of<int32_t>(permutation), data_of<int32_t>(inverse));
    if (keep) {  // rows of sentinels are saved too, and no one computes them
        memset(at_element(pre_activation, bounds[call.experts] * 2 * call.intermediate), 0,
               (call.rows - bounds[call.experts]) * 2 * call.intermediate * x.element_size());
    }
    const std::vector<int32_t> token = tokens_of(data_of<int32_t>(permutation), call);
    const LowProduct low_x(call, Transposed::yes, {x, token.data()}, up_a, up_b, bounds, lora.scale);
    up_projection(call, bounds, token.data(), keep ? &pre_activation : nullptr, activated, low_x);
    const LowProduct low_activated(call, Transposed::yes, {activated, nullptr}, down_a, down_b, bounds, lora.scale);
    product_and_combine(call, Transposed::yes, activated, down, low_activated, bounds, data_of<int32_t>(inverse),
                        data_of<float>(weights), out);
    return {out, pre_activation, offsets, permutation, inverse};
}

// What a backward is to write; a gradient that is not needed is an empty tensor.
struct Needed {
    bool hidden, weights, gate_up, down, up_a, up_b, down_a, down_b;
    bool pre_activation() const { return hidden || gate_up || up_a || up_b; }
    bool activated() const { return down || down_a || down_b; }
};

// dS (T, K) from its partial sums (parts, S) in expert order; 0 for sentinels.
void finish_weights_gradient(const Experts& call, const std::vector<float>& partial, int64_t parts,
                             const int32_t* offsets, const int32_t* permutation, float* grad) {
    for (int64_t row = 0; row < call.rows; ++row) {
        double total = 0;
        if (row < offsets[call.experts]) {
            for (int64_t part = 0; part < parts; ++part) total += partial[part * call.rows + row];
        }
        grad[permutation[row]] = static_cast<float>(total);
    }
}

ExpertsGradients experts_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
    const Tensor& kept, const Tensor& offsets, const Tensor& permutation, const Tensor& inverse, int64_t activation,
    double alpha, double limit, double shift, bool batch_invariant, bool need_hidden, bool need_weights,
    bool need_gate_up, bool need_down, bool need_up_a, bool need_up_b, bool need_down_a, bool need_down_b,
    const std::optional<Tensor>& up_a, const std::optional<Tensor>& up_b, const std::optional<Tensor>& down_a,
    const std::optional<Tensor>& down_b, double scale) {
    const Experts call(x, weights, gate_up, down, gating_of(activation, alpha, limit, shift), batch_invariant);
    const Lora lora(up_a, up_b, down_a, down_b, scale, x, gate_up, down);
    const Needed needed = {need_hidden, need_weights, need_gate_up,        need_down,
                           need_up_a && up_a, need_up_b && up_b, need_down_a && down_a, need_down_b && down_b};
    const MoeKernels& kernels = chosen_moe_kernels();
    const int64_t width = call.intermediate;
    check("grad", grad, call.dtype, {call.tokens, call.hidden});
    check_order(call, offsets, permutation, inverse);
    const int32_t* bounds = data_of<int32_t>(offsets);
    const int32_t* order = data_of<int32_t>(permutation);
    const std::vector<int32_t> token = tokens_of(order, call);
    const bool recompute = kept.size(0) != call.rows;
    const Tensor activated = kept_on(x, {recompute || needed.activated() ? call.rows : 0, width}, call.dtype);
    const Tensor pre_activation = recompute ? kept_on(x, {call.rows, 2 * width}, call.dtype) : kept;
    const ExpertRows x_rows = {x, token.data()}, grad_rows = {grad, token.data()};
    LowProduct low_x, low_grad;
    if (recompute || needed.up_b) low_x = {call, Transposed::yes, x_rows, up_a, up_b, bounds, lora.scale};
    if (recompute) up_projection(call, bounds, token.data(), &pre_activation, activated, low_x);
    check("pre_activation", pre_activation, call.dtype, {call.rows, 2 * width});

    if (needed.pre_activation() || needed.weights || needed.down_a) {
        low_grad = {call, Transposed::no, grad_rows, down_b, down_a, bounds, lora.scale};
    }
    // dA' by blocks, and what follows from it element by element
    std::vector<float> scales(call.rows);
    for (int64_t row = 0; row < call.rows; ++row) scales[row] = data_of<float>(weights)[order[row]];
    const int64_t parts = (width + kMoeGateColumns - 1) / kMoeGateColumns;
    std::vector<float> partial(needed.weights ? parts * call.rows : 0);
    const Tensor grad_pre = kept_on(x, {needed.pre_activation() ? call.rows : 0, 2 * width}, call.dtype);
    const LowRank low = low_grad;
    const std::vector<Block> blocks = blocks_of(bounds, call.experts, width, kMoeGateColumns);
    share(blocks.size(), bounds[call.experts] * width * call.hidden, kernels.workspace,
          [&](int64_t item, void* workspace) {
              const Block& block = blocks[item];
              GateBlock at = gate_block(call, block, grad, token.data());
              at.weight = at_element(call.down, block.expert * call.hidden * width + block.column);
              at.pre_activation = at_element(pre_activation, block.row * 2 * width + block.column);
              at.low = low.at(Transposed::no, block, block.column);
              if (needed.activated()) at.activated = at_element(activated, block.row * width + block.column);
              at.scales = scales.data() + block.row;
              if (needed.weights) {
                  at.grad_scales = partial.data() + block.column / kMoeGateColumns * call.rows + block.row;
              }
              if (needed.pre_activation()) at.grad_pre = at_element(grad_pre, block.row * 2 * width + block.column);
              kernels.gate_backward(at, workspace);
          });

    const Tensor grad_hidden = kept_on(x, {needed.hidden ? call.tokens : 0, call.hidden}, call.dtype);
    const Tensor grad_weights = kept_on(x, {needed.weights ? call.tokens : 0, call.top_k}, ScalarType::Float);
    const Tensor grad_gate_up =
        kept_on(x, {needed.gate_up ? call.experts : 0, 2 * width, call.hidden}, call.dtype);
    const Tensor grad_down = kept_on(x, {needed.down ? call.experts : 0, call.hidden, width}, call.dtype);
    if (needed.weights) {
        finish_weights_gradient(call, partial, parts, bounds, order, data_of<float>(grad_weights));
    }
    if (needed.down) grouped_weight_gradient(grad_rows, {activated, nullptr}, bounds, grad_down);
    if (needed.gate_up) grouped_weight_gradient({grad_pre, nullptr}, x_rows, bounds, grad_gate_up);

    // of W + c B A: dB = dY^T (c X A^T) and dA = (c dY B)^T X, where dY are the gradients of the rows
    const auto matrix = [&](std::initializer_list<int64_t> sizes) { return kept_on(x, sizes, call.dtype); };
    const std::vector<Tensor> of_lora =
        gradients_of(lora, {needed.up_a, needed.up_b, needed.down_a, needed.down_b}, matrix);
    if (needed.down_a) grouped_weight_gradient({low_grad.rows(), nullptr}, {activated, nullptr}, bounds, of_lora[2]);
    if (needed.down_b) {
        const Tensor low_activated =
            low_rows(call, Transposed::yes, {activated, nullptr}, *down_a, bounds, lora.scale);
        grouped_weight_gradient(grad_rows, {low_activated, nullptr}, bounds, of_lora[3]);
    }
    if (needed.up_b) grouped_weight_gradient({grad_pre, nullptr}, {low_x.rows(), nullptr}, bounds, of_lora[1]);
    LowProduct low_pre;
    if (needed.hidden || needed.up_a) {
        low_pre = {call, Transposed::no, {grad_pre, nullptr}, up_b, up_a, bounds, lora.scale};
    }
    if (needed.up_a) grouped_weight_gradient({low_pre.rows(), nullptr}, x_rows, bounds, of_lora[0]);
    if (needed.hidden) {
        product_and_combine(call, Transposed::no, grad_pre, gate_up, low_pre, bounds, data_of<int32_t>(inverse), nullptr,
                            grad_hidden);
    }
    return {grad_hidden, grad_weights, grad_gate_up, grad_down, of_lora};
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("moe_experts_cpu", TORCH_BOX(&experts_forward));
    library.impl("moe_experts_cpu_backward", TORCH_BOX(&experts_backward));
}

}  // namespace

}  // namespace r1kernels
