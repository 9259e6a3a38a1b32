// What the MoE ops on the CPU share: the counting sort, and sharing blocks out to torch's threads.
// Included by ops.cpp alone. T tokens, E experts, K experts per token, S = T * K routed rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "common/kept.h"
#include "common/memory.h"
#include "moe/checks.h"
#include "moe/cpu.h"

namespace r1kernels {

namespace {

char* at_element(const Tensor& tensor, int64_t element) {
    return data_of<char>(tensor) + element * static_cast<int64_t>(tensor.element_size());
}

// --- threads ---

constexpr int64_t kWorkOfThread = 1 << 18;  // multiply-adds; less is not worth a thread of its own

struct FreeAligned {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

// Scratch that each thread keeps between calls.
void* thread_workspace(int64_t bytes) {
    thread_local std::unique_ptr<char[], FreeAligned> memory;
    thread_local int64_t size = 0;
    if (size < bytes) {
        memory.reset(new (std::align_val_t(64)) char[bytes]);
        size = bytes;
    }
    return memory.get();
}

// Calls run(item, workspace) for the items [0, count), each thread taking the next one when it is free.
template <typename Run>
void share(int64_t count, int64_t work, int64_t workspace_bytes, const Run& run) {
    const int64_t threads =
        std::min({count, work / kWorkOfThread + 1, static_cast<int64_t>(torch::stable::get_num_threads())});
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        void* workspace = thread_workspace(workspace_bytes);
        for (int64_t thread = begin; thread < end; ++thread) {
            for (int64_t item = next++; item < count; item = next++) run(item, workspace);
        }
    });
}

// --- blocks of a grouped product ---

struct Block {
    int64_t expert, row, rows, column, columns;
};

void add_columns(std::vector<Block>& blocks, Block block, int64_t columns, int64_t block_columns) {
    for (block.column = 0; block.column < columns; block.column += block_columns) {
        block.columns = std::min(block_columns, columns - block.column);
        blocks.push_back(block);
    }
}

// The rows of each expert in nearly equal parts of at most kMoeBlockRows, times the columns in parts.
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

// --- products over all experts ---

// A matrix of S rows in expert order.
struct ExpertRows {
    const Tensor& values;
    const int32_t* index;  // the row of `values` for each row in expert order, or null for the same

    MoeRows at(int64_t row, int64_t column) const {
        const int64_t stride = values.size(1);
        if (index) return {at_element(values, column), stride, index + row};
        return {at_element(values, row * stride + column), stride, nullptr};
    }
};

enum class Transposed { no, yes };

// out (S, columns of the weight from `column` on) = x weight[e]^T or, not transposed, x weight[e]; weight (E, N, K).
void grouped_product(Transposed transposed, const ExpertRows& x, const Tensor& weight, const int32_t* offsets,
                     int64_t column, int64_t columns, void* out, bool float_out) {
    const MoeKernels& kernels = chosen_moe_kernels();
    const int64_t rows = weight.size(1), stride = weight.size(2);
    const int64_t depth = transposed == Transposed::yes ? stride : rows;
    const int64_t out_size = float_out ? sizeof(float) : weight.element_size();
    const std::vector<Block> blocks = blocks_of(offsets, weight.size(0), columns, kMoeBlockColumns);
    const auto run = transposed == Transposed::yes ? kernels.product_nt : kernels.product_nn;
    share(blocks.size(), offsets[weight.size(0)] * columns * depth, kernels.workspace,
          [&](int64_t item, void* workspace) {
              const Block& block = blocks[item];
              const int64_t first = column + block.column;
              const int64_t at = block.expert * rows * stride + (transposed == Transposed::yes ? first * stride : first);
              run({element_of("weight", weight), x.at(block.row, 0), at_element(weight, at), stride, block.rows,
                   block.columns, depth, static_cast<char*>(out) + (block.row * columns + block.column) * out_size,
                   columns, float_out},
                  workspace);
          });
}

// grad (E, M, N): grad[e] = a^T b over the rows of e; zeros for an expert without rows.
void grouped_weight_gradient(const ExpertRows& a, const ExpertRows& b, const int32_t* offsets, const Tensor& grad) {
    const MoeKernels& kernels = chosen_moe_kernels();
    const int64_t experts = grad.size(0), m = grad.size(1), n = grad.size(2);
    want_huge_pages(grad.data_ptr(), grad.numel() * grad.element_size());
    const std::vector<Block> blocks = weight_blocks_of(experts, m, n);
    share(blocks.size(), offsets[experts] * m * n + grad.numel(), kernels.workspace,
          [&](int64_t item, void* workspace) {
              const Block& block = blocks[item];
              const int64_t first = offsets[block.expert], rows = offsets[block.expert + 1] - first;
              void* to = at_element(grad, (block.expert * m + block.row) * n + block.column);
              kernels.product_tn({element_of("grad", grad), a.at(first, block.row), nullptr, 0, block.rows,
                                  block.columns, rows, to, n, false},
                                 b.at(first, block.column), workspace);
          });
}

// --- the order of experts ---

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

}  // namespace

}  // namespace r1kernels
