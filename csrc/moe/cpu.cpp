// The MoE ops on the CPU, compiled once for each instruction set (see common/vector.h).
#include "moe/cpu.h"

#include "moe/cpu_experts.h"
#include "moe/cpu_route.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

static_assert(kMoeBlockRows == kBlockRows && kMoeBlockColumns == kBlockColumns);

Workspace workspace_at(void* base) { return {static_cast<float*>(base)}; }

void product_nt_any(const ProductBlock& product, void* workspace) {
    with_element(product.element, [&](auto zero) { product_nt_of<decltype(zero)>(product, workspace_at(workspace)); });
}

void product_nn_any(const ProductBlock& product, void* workspace) {
    with_element(product.element, [&](auto zero) { product_nn_of<decltype(zero)>(product, workspace_at(workspace)); });
}

void product_tn_any(const ProductBlock& product, const BlockRows& b, void* workspace) {
    with_element(product.element,
                 [&](auto zero) { product_tn_of<decltype(zero)>(product, b, workspace_at(workspace)); });
}

void up(const GateBlock& block, void* workspace) {
    with_element(block.element, [&](auto zero) {
        typedef decltype(zero) T;
        if (block.gating.activation == Activation::silu) {
            up_of<T, Activation::silu>(block, workspace_at(workspace));
        } else {
            up_of<T, Activation::gelu_tanh>(block, workspace_at(workspace));
        }
    });
}

void gate_backward(const GateBlock& block, void* workspace) {
    with_element(block.element, [&](auto zero) {
        typedef decltype(zero) T;
        if (block.gating.activation == Activation::silu) {
            gate_backward_of<T, Activation::silu>(block, workspace_at(workspace));
        } else {
            gate_backward_of<T, Activation::gelu_tanh>(block, workspace_at(workspace));
        }
    });
}

void combine(const CombineBlock& call, int64_t first_token, int64_t last_token) {
    with_element(call.element, [&](auto zero) { combine_of<decltype(zero)>(call, first_token, last_token); });
}

void route(const R1kernelsRoute& call, int64_t* indices, float* weights, void* scratch, int64_t begin, int64_t end) {
    with_element(call.element, [&](auto zero) {
        route_of<decltype(zero)>(call, indices, weights, scratch, begin, end);
    });
}

void route_backward(const R1kernelsRoute& call, const int64_t* indices, const float* grad_weights, void* grad_logits,
                    void* scratch, int64_t begin, int64_t end) {
    with_element(call.element, [&](auto zero) {
        route_backward_of<decltype(zero)>(call, indices, grad_weights, grad_logits, scratch, begin, end);
    });
}

}  // namespace

extern const MoeKernels moe_kernels;
const MoeKernels moe_kernels = {
    Workspace::kFloats * sizeof(float), product_nt_any, product_nn_any, product_tn_any, up, gate_backward, combine,
    route, route_backward,
};

}  // namespace r1kernels::R1KERNELS_ISA
