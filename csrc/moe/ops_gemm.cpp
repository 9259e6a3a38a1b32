// The torch ops sort_by_expert and grouped_gemm on the CPU, and the products over all experts behind them.
#include "moe/ops.h"

#include <algorithm>

#include "common/kept.h"
#include "common/memory.h"
#include "common/share.h"

namespace r1kernels {

// --- blocks of a grouped product ---

namespace {

void add_columns(std::vector<Block>& blocks, Block block, int64_t columns, int64_t block_columns) {
    for (block.column = 0; block.column < columns; block.column += block_columns) {
        block.columns = std::min(block_columns, columns - block.column);
        blocks.push_back(block);
    }
}

// The gradients (m, n) of the weights of all experts, those without rows too.
std::vector<Block> weight_blocks_of(int64_t experts, int64_t m, int64_t n) {
    std::vector<Block> blocks;
    for (int64_t expert = 0; expert < experts; ++expert) {
        for (int64_t row = 0; row < m; row += kMoeBlockRows) {
            add_columns(blocks, {expert, row, std::min(kMoeBlockRows, m - row), 0, 0}, n, kMoeBlockColumns);
        }
    }
    return blocks;
}

}  // namespace

std::vector<Block> blocks_of(const int32_t* offsets, int64_t experts, int64_t columns, int64_t block_columns) {
    std::vector<Block> blocks;
    for (int64_t expert = 0; expert < experts; ++expert) {
        const int64_t first = offsets[expert], rows = offsets[expert + 1] - first;
        const int64_t parts = (rows + kMoeBlockRows - 1) / kMoeBlockRows;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = part * rows / parts, end = (part + 1) * rows / parts;
            add_columns(blocks, {expert, first + begin, end - begin, 0, 0}, columns, block_columns);
        }
    }
    return blocks;
}

// --- products over all experts ---

void grouped_product(const Product& product) {
    const MoeKernels& kernels = chosen_moe_kernels();
    const Tensor& weight = product.weight;
    const Transposed transposed = product.transposed;
    const int64_t columns = product.columns, experts = weight.size(0);
    const int64_t depth = weight.size(transposed == Transposed::yes ? 2 : 1);
    const int64_t out_size = product.float_out ? sizeof(float) : weight.element_size();
    // narrower where the threads would have no block each, as of a router's few columns: no bit depends on it
    const size_t threads = torch::stable::get_num_threads();
    int64_t block_columns = kMoeBlockColumns;
    std::vector<Block> blocks = blocks_of(product.offsets, experts, columns, block_columns);
    while (blocks.size() < threads && block_columns > kMoeLeastColumns) {
        block_columns /= 2;
        blocks = blocks_of(product.offsets, experts, columns, block_columns);
    }
    const auto run = transposed == Transposed::yes ? kernels.product_nt : kernels.product_nn;
    share(blocks.size(), product.offsets[experts] * columns * depth, kernels.workspace,
          [&](int64_t item, void* workspace) {
              const Block& block = blocks[item];
              const int64_t first = product.column + block.column;
              run({element_of("weight", weight), product.x.at(block.row, 0),
                   at_element(weight, place_in(weight, transposed, block.expert, first)), weight.size(2), block.rows,
                   block.columns, depth, static_cast<char*>(product.out) + (block.row * columns + block.column) * out_size,
                   columns, product.float_out, product.batch_invariant, product.scale,
                   product.low.at(transposed, block, first), false},
                  workspace);
          });
}

void grouped_weight_gradient(const ExpertRows& a, const ExpertRows& b, const int32_t* offsets, const Tensor& grad) {
    const MoeKernels& kernels = chosen_moe_kernels();
    const int64_t experts = grad.size(0), m = grad.size(1), n = grad.size(2);
    const int64_t bytes = grad.numel() * grad.element_size();
    want_huge_pages(grad.data_ptr(), bytes);
    const std::vector<Block> blocks = weight_blocks_of(experts, m, n);
    share(blocks.size(), offsets[experts] * m * n + grad.numel(), kernels.workspace,
          [&](int64_t item, void* workspace) {
              const Block& block = blocks[item];
              const int64_t first = offsets[block.expert], rows = offsets[block.expert + 1] - first;
              void* to = at_element(grad, (block.expert * m + block.row) * n + block.column);
              kernels.product_tn({element_of("grad", grad), a.at(first, block.row), nullptr, 0, block.rows,
                                  block.columns, rows, to, n, false, false, 1.0f, {}, bytes >= kStreamedBytes},
                                 b.at(first, block.column), workspace);
          });
}

// --- the ops ---

namespace {

std::tuple<Tensor, Tensor, Tensor> sort(const Tensor& indices, int64_t experts) {
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

// Rows behind the last expert are no one's: zeros.
void clear_rest(const Tensor& rows, int64_t first) {
    memset(at_element(rows, first * rows.size(1)), 0, (rows.size(0) - first) * rows.size(1) * rows.element_size());
}

// y = x weight[e]^T, or of a weight that is given transposed x weight[e].
Tensor gemm_forward(const Tensor& x, const Tensor& weight, const Tensor& offsets, bool transposed,
                    bool batch_invariant) {
    const int32_t* bounds = checked_offsets(offsets, x, weight);
    const int64_t inputs = weight.size(transposed ? 1 : 2), outputs = weight.size(transposed ? 2 : 1);
    check("x", x, x.scalar_type(), {x.size(0), inputs});
    const Tensor out = kept_on(x, {x.size(0), outputs}, x.scalar_type());
    grouped_product({transposed ? Transposed::no : Transposed::yes, {x, nullptr}, weight, bounds, 0, outputs,
                     out.data_ptr(), false, batch_invariant});
    clear_rest(out, bounds[weight.size(0)]);
    return out;
}

std::tuple<Tensor, Tensor> gemm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                         const Tensor& offsets, bool transposed, bool need_x, bool need_weight) {
    const int32_t* bounds = checked_offsets(offsets, x, weight);
    const int64_t rows = x.size(0), experts = weight.size(0), m = weight.size(1), n = weight.size(2);
    const Tensor &left = transposed ? x : grad, &right = transposed ? grad : x;  // of the weight's gradient
    check("x", x, x.scalar_type(), {rows, transposed ? m : n});
    check("grad", grad, x.scalar_type(), {rows, transposed ? n : m});
    const Tensor grad_x = kept_on(x, {need_x ? rows : 0, x.size(1)}, x.scalar_type());
    const Tensor grad_weight = kept_on(x, {need_weight ? experts : 0, m, n}, x.scalar_type());
    if (need_x) {
        grouped_product({transposed ? Transposed::yes : Transposed::no, {grad, nullptr}, weight, bounds, 0, x.size(1),
                         grad_x.data_ptr()});
        clear_rest(grad_x, bounds[experts]);
    }
    if (need_weight) grouped_weight_gradient({left, nullptr}, {right, nullptr}, bounds, grad_weight);
    return {grad_x, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("sort_by_expert_cpu", TORCH_BOX(&sort));
    library.impl("grouped_gemm_cpu", TORCH_BOX(&gemm_forward));
    library.impl("grouped_gemm_cpu_backward", TORCH_BOX(&gemm_backward));
}

}  // namespace

}  // namespace r1kernels
