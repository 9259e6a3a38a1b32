// The blocks of grouped_gemm and moe_experts on the CPU. Included by cpu.cpp alone, once for each instruction set.
//
// Notation: x token, (g, u) = pre-activation, A what the gate makes of it (Gating), s routing weight, dO gradient of the output,
//     dA' = dO W2        dS = <dA', A>        dW2 = dO^T (s A)
//     dg = s dA' dA/dg        du = s dA' dA/du        dW1 = (dg, du)^T X        dX = (dg, du) W1
#pragma once

#include "common/gemm/turned.h"
#include "moe/cpu.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

// Up to here packing the weights would cost more than it gains; for tile registers they are not packed.
template <typename T>
constexpr int64_t kFewRows = kInTiles<T> ? 0 : 24;

template <typename T>
Rows<T> rows_of(const BlockRows& rows) { return {static_cast<const T*>(rows.data), rows.stride, rows.index}; }

template <typename T>
Rows<T> rows_of(const LowRankBlock& low) { return {static_cast<const T*>(low.rows), low.rank, nullptr}; }

template <typename T>
void store_product(const ProductBlock& product, float* c) {
    for (int64_t row = 0; row < product.m; ++row) {
        float* from = c + row * kBlockColumns;
        if (product.scale != 1.0f) {
            for (int64_t i = 0; i < product.n; ++i) from[i] *= product.scale;
        }
        const int64_t at = row * product.out_stride;
        if (product.float_out) {
            memcpy(static_cast<float*>(product.out) + at, from, product.n * sizeof(float));
        } else {
            store_row(from, product.n, static_cast<T*>(product.out) + at);
        }
    }
}

template <typename T>
void product_nt_of(const ProductBlock& product, const Workspace& workspace) {
    const Rows<T> a = rows_of<T>(product.a);
    const T* b = static_cast<const T*>(product.b);
    if (product.m <= kFewRows<T> && !product.batch_invariant) {
        dot_product(a, product.m, b, product.b_stride, product.n, product.k, workspace.product(), kBlockColumns);
    } else {
        product_nt(a, product.m, b, product.b_stride, product.n, product.k, workspace.product(), kBlockColumns,
                   workspace);
    }
    if (const LowRankBlock& low = product.low; low.rows) {
        product_nt(rows_of<T>(low), product.m, static_cast<const T*>(low.weight), low.weight_stride, product.n, low.rank,
                   workspace.product(), kBlockColumns, workspace, true);
    }
    store_product<T>(product, workspace.product());
}

template <typename T>
void product_nn_of(const ProductBlock& product, const Workspace& workspace) {
    product_nn(rows_of<T>(product.a), product.m, static_cast<const T*>(product.b), product.b_stride, product.n,
               product.k, workspace.product(), kBlockColumns, workspace);
    if (const LowRankBlock& low = product.low; low.rows) {
        product_nn(rows_of<T>(low), product.m, static_cast<const T*>(low.weight), low.weight_stride, product.n, low.rank,
                   workspace.product(), kBlockColumns, workspace, true);
    }
    store_product<T>(product, workspace.product());
}

template <typename T>
void product_tn_of(const ProductBlock& product, const BlockRows& b, const Workspace& workspace) {
    product_tn(rows_of<T>(product.a), 0, product.m, rows_of<T>(b), 0, product.n, product.k,
               static_cast<T*>(product.out), product.out_stride, product.streamed, workspace);
}

// --- the activation ---

struct Gate {
    Floats value, by_gate, by_up;  // a, da/dg, da/du
};

// Both activations are g sigmoid(z): z = alpha g for silu, z = 2 sqrt(2 / pi) (g + 0.044715 g^3) for gelu_tanh, so that
// act' = sigmoid(z) + g sigmoid(z) sigmoid(-z) z'. Beyond the limit nothing moves; NaN stays.
template <Activation kActivation>
Gate gate_of(const Gating& gating, Floats gate, Floats up) {
    const Floats limit = all(gating.limit);
    const Floats g = gate > limit ? limit : gate;
    const Floats u = (up > limit ? limit : up < -limit ? -limit : up) + gating.shift;
    Floats z = gating.alpha * g, z_slope = all(gating.alpha);
    if constexpr (kActivation == Activation::gelu_tanh) {
        const Floats square = g * g;
        z = g * (1.5957691216057308f + 0.07135481627159600f * square);
        z_slope = 1.5957691216057308f + 0.21406444881478800f * square;
    }
    const Floats e = exp_negative((Floats)((Words)z | 0x80000000u));  // e^-|z|
    const Floats larger = 1.0f / (1.0f + e), smaller = e * larger;
    const Floats sigmoid = z < 0 ? smaller : larger;
    const Floats spread = g * (larger * smaller);
    const Floats act = g * sigmoid, slope = sigmoid + (spread == 0 ? Floats{} : spread * z_slope);
    return {act * u, gate > limit ? Floats{} : u * slope, (up > limit) | (up < -limit) ? Floats{} : act};
}

template <typename T>
Floats rounded(Floats value) {
    T buffer[kLanes];
    store(buffer, value);
    return load(buffer);
}
template <>
Floats rounded<float>(Floats value) { return value; }

template <typename T>
Floats load_up_to(const T* from, int64_t count) { return count >= kLanes ? load(from) : load_front(from, count); }

template <typename T>
void store_up_to(T* to, Floats value, int64_t count) {
    if (count >= kLanes) {
        store(to, value);
    } else {
        store_some(to, value, static_cast<int>(count));
    }
}

// --- forward ---

template <typename T, Activation kActivation>
void up_of(const GateBlock& block, const Workspace& workspace) {
    const Rows<T> x = rows_of<T>(block.tokens);
    const T* weight = static_cast<const T*>(block.weight);
    const int64_t size = block.hidden, width = block.intermediate;
    float* gate = workspace.product();
    float* up = gate + kMoeGateColumns;
    if (block.rows <= kFewRows<T> && !block.batch_invariant) {
        dot_product(x, block.rows, weight, size, block.columns, size, gate, kBlockColumns);
        dot_product(x, block.rows, weight + width * size, size, block.columns, size, up, kBlockColumns);
    } else {
        product_nt_pair(x, block.rows, weight, weight + width * size, size, block.columns, size, kMoeGateColumns, gate,
                        kBlockColumns, workspace);
    }
    if (const LowRankBlock& low = block.low; low.rows) {
        const T* first = static_cast<const T*>(low.weight);
        product_nt_pair(rows_of<T>(low), block.rows, first, first + width * low.rank, low.weight_stride, block.columns,
                        low.rank, kMoeGateColumns, gate, kBlockColumns, workspace, true);
    }
    for (int64_t row = 0; row < block.rows; ++row, gate += kBlockColumns, up += kBlockColumns) {
        T* kept = block.pre_activation ? static_cast<T*>(block.pre_activation) + row * 2 * width : nullptr;
        T* activated = static_cast<T*>(block.activated) + row * width;
        for (int64_t i = 0; i < block.columns; i += kLanes) {
            const int64_t count = block.columns - i;
            const Floats g = rounded<T>(load(gate + i)), u = rounded<T>(load(up + i));
            if (kept) {
                store_up_to(kept + i, g, count);
                store_up_to(kept + width + i, u, count);
            }
            store_up_to(activated + i, gate_of<kActivation>(block.gating, g, u).value, count);
        }
    }
}

// --- backward ---

template <typename T, Activation kActivation>
void gate_backward_of(const GateBlock& block, const Workspace& workspace) {
    const int64_t width = block.intermediate;
    const bool product = block.grad_scales || block.grad_pre;
    const float* unscaled = workspace.product();
    if (product) {
        product_nn(rows_of<T>(block.tokens), block.rows, static_cast<const T*>(block.weight), width, block.columns,
                   block.hidden, workspace.product(), kBlockColumns, workspace);
        if (const LowRankBlock& low = block.low; low.rows) {
            product_nn(rows_of<T>(low), block.rows, static_cast<const T*>(low.weight), low.weight_stride, block.columns,
                       low.rank, workspace.product(), kBlockColumns, workspace, true);
        }
    }
    for (int64_t row = 0; row < block.rows; ++row, unscaled += kBlockColumns) {
        const T* pre = static_cast<const T*>(block.pre_activation) + row * 2 * width;
        T* scaled = block.activated ? static_cast<T*>(block.activated) + row * width : nullptr;
        T* grad_pre = block.grad_pre ? static_cast<T*>(block.grad_pre) + row * 2 * width : nullptr;
        const float s = block.scales[row];
        Floats along = {};
        for (int64_t i = 0; i < block.columns; i += kLanes) {
            const int64_t count = block.columns - i;
            const Floats g = load_up_to(pre + i, count), u = load_up_to(pre + width + i, count);
            const Gate gate = gate_of<kActivation>(block.gating, g, u);
            const Floats a = rounded<T>(gate.value);
            if (scaled) store_up_to(scaled + i, s * a, count);
            if (!product) continue;
            const Floats da = load_up_to(unscaled + i, count);
            along += da * a;
            if (grad_pre) {
                store_up_to(grad_pre + i, s * da * gate.by_gate, count);
                store_up_to(grad_pre + width + i, s * da * gate.by_up, count);
            }
        }
        if (block.grad_scales) block.grad_scales[row] = static_cast<float>(sum(along));
    }
}

// --- combine ---

template <typename T>
void combine_of(const CombineBlock& call, int64_t first_token, int64_t last_token) {
    for (int64_t token = first_token; token < last_token; ++token) {
        const int32_t* inverse = call.inverse + token * call.top_k;
        const float* weights = call.weights ? call.weights + token * call.top_k : nullptr;
        T* out = static_cast<T*>(call.out) + token * call.out_stride;
        for (int64_t i = 0; i < call.columns; i += kLanes) {
            const int64_t count = call.columns - i;
            Floats total = {};
            for (int64_t k = 0; k < call.top_k; ++k) {
                if (inverse[k] >= call.limit) continue;  // a sentinel: its row was never written
                const Floats value = load_up_to(call.rows + inverse[k] * call.rows_stride + i, count);
                total += weights ? weights[k] * value : value;
            }
            store_up_to(out + i, total, count);
        }
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
