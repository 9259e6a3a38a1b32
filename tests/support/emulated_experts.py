"""The launches of csrc/moe/cuda_experts.h under the host emulator, behind the ops of the backend "cuda" for CPU tensors.

Every operand lies between redzones, `offset` elements behind a multiple of 16 bytes; outputs are NaN before they are written.
"""

from __future__ import annotations

import torch

from r1kernels.moe.experts import Lora, LoraBackward
from tests.support.redzones import Redzones

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)


class EmulatedExperts:
    """``module`` is what tests/emulator/moe_experts.cpp defines."""

    def __init__(self, module):
        self.module, self.offset = module, 0

    def register(self, library):
        for name, function in (
            ("grouped_gemm_cuda", self.gemm),
            ("grouped_gemm_cuda_backward", self.gemm_backward),
            ("moe_experts_cuda", self.experts),
            ("moe_experts_cuda_backward", self.experts_backward),
        ):
            library.impl(name, function, "CPU")

    def gemm(self, x, weight, offsets, transposed, batch_invariant):
        zones = Zones(self.offset)
        out = zones.output(x, x.shape[0], weight.shape[2 if transposed else 1])
        call = self.gemm_call(zones, x, weight, offsets, transposed)
        self.module.gemm_forward(call, out.data_ptr())
        zones.check()
        return out

    def gemm_backward(self, grad, x, weight, offsets, transposed, need_x, need_weight):
        zones = Zones(self.offset)
        grads = [zones.gradient(x, need_x), zones.gradient(weight, need_weight)]
        call = self.gemm_call(zones, x, weight, offsets, transposed)
        self.module.gemm_backward(call, zones.input(grad), *map(address, grads))
        zones.check()
        return tuple(grads)

    def gemm_call(self, zones, x, weight, offsets, transposed):
        pointers = (zones.input(x), zones.input(weight), zones.input(offsets))
        experts, outputs, inputs = weight.shape
        if transposed:
            inputs, outputs = outputs, inputs
        sizes = (x.shape[0], experts, outputs, inputs, transposed)
        return self.module.Gemm(ELEMENTS.index(x.dtype), *sizes, *pointers)

    def experts(
        self,
        hidden,
        indices,
        weights,
        gate_up,
        down,
        activation,
        alpha,
        limit,
        shift,
        batch_invariant,
        keep,
        *lora,
    ):
        zones = Zones(self.offset)
        rows = indices.numel()
        out = zones.output(hidden, *hidden.shape)
        kept = zones.output(hidden, rows if keep else 0, gate_up.shape[1])
        order = [zones.redzones.output(size, dtype=torch.int32) for size in (down.shape[0] + 1, rows, rows)]
        pointers = [tensor.data_ptr() for tensor in order]
        gating = (activation, alpha, limit, shift)
        call = self.experts_call(zones, hidden, weights, gate_up, down, gating, pointers, lora)
        self.module.experts_forward(call, zones.input(indices), address(kept), out.data_ptr())
        zones.check()
        return out, kept, *order

    def experts_backward(
        self, grad, hidden, weights, gate_up, down, kept, offsets, permutation, inverse, *others
    ):
        # between gating and needed: batch_invariant
        gating, needed, low = others[:4], others[5:9], others[9:]
        *low_needed, lora = LoraBackward(*low[:4], Lora(*low[4:]))
        zones = Zones(self.offset)
        leaves = (hidden, weights, gate_up, down, *lora[:4])
        grads = [
            zones.gradient(leaf, need) for leaf, need in zip(leaves, (*needed, *low_needed), strict=True)
        ]
        order = [zones.input(tensor) for tensor in (offsets, permutation, inverse)]
        call = self.experts_call(zones, hidden, weights, gate_up, down, gating, order, lora)
        is_kept = zones.input(kept) if kept.numel() else 0
        self.module.experts_backward(call, zones.input(grad), is_kept, *map(address, grads))
        zones.check()
        return *grads[:4], grads[4:] if lora.is_there() else []

    def experts_call(self, zones, hidden, weights, gate_up, down, gating, order, lora):
        sizes = (*hidden.shape, down.shape[2], down.shape[0], weights.shape[1])
        pointers = [zones.input(tensor) for tensor in (hidden, weights, gate_up, down)]
        *matrices, scale = Lora(*lora)  # the last arguments that are their defaults are not passed
        low = []
        for a, b in (matrices[:2], matrices[2:]):
            low += [0, 0, 0] if a is None else [zones.input(a), zones.input(b), a.shape[1]]
        return self.module.Experts(
            ELEMENTS.index(hidden.dtype), *gating, *sizes, *pointers, *order, *low, scale
        )


class Zones:
    def __init__(self, offset):
        self.redzones, self.offset = Redzones(), offset
        self.check = self.redzones.check

    def input(self, tensor):
        offset = self.offset if tensor.dtype in ELEMENTS else 0
        return self.redzones.input(tensor.detach(), offset=offset).data_ptr()

    def output(self, like, *shape):
        return self.redzones.output(*shape, dtype=like.dtype, offset=self.offset)

    def gradient(self, like, needed):
        if like is None:
            return torch.empty(0)
        return self.output(like, like.shape[0] if needed else 0, *like.shape[1:])


def address(tensor):
    return tensor.data_ptr() if tensor.numel() else 0
