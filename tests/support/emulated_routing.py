"""The launchers of csrc/moe/cuda.h under the host emulator, behind the ops of the backend "cuda" for CPU tensors.

Every operand lies between redzones, `offset` elements behind a multiple of 16 bytes; outputs are NaN, or large, before they
are written.
"""

from __future__ import annotations

import torch

from r1kernels.moe.routing import Choice
from tests.support.redzones import Redzones

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)


class EmulatedRouting:
    """``module`` is what tests/emulator/moe_routing.cpp defines."""

    def __init__(self, module):
        self.module, self.offset = module, 0

    def register(self, library):
        for name, function in (
            ("sort_by_expert_cuda", self.sort),
            ("route_cuda", self.route),
            ("route_cuda_backward", self.route_backward),
        ):
            library.impl(name, function, "CPU")

    def sort(self, indices, experts, dtype=torch.int64):
        zones = Redzones()
        rows = indices.numel()
        order = [
            zones.output(experts + 1, dtype=torch.int32),
            *(zones.output(rows, dtype=dtype, offset=self.offset) for _ in range(2)),
        ]
        wide = dtype == torch.int64
        self.run(
            zones, self.module.sort, self.place(zones, indices), rows, experts, wide, *map(address, order)
        )
        return tuple(order)

    def route(
        self,
        logits,
        top_k,
        score,
        normalize,
        eps,
        scale,
        *choice,
    ):
        # the last arguments that are their defaults are not passed
        by_logits, bias, n_group, topk_group, two_best, indices = Choice(*choice)
        zones = Redzones()
        tokens, experts = logits.shape
        outputs = [
            zones.output(tokens, top_k, offset=self.offset),
            zones.output(tokens, top_k, dtype=torch.int64, offset=self.offset),
            zones.output(experts, dtype=torch.int32),
        ]
        router = self.router(zones, logits, top_k, score, normalize, eps, scale)
        selection = (by_logits, n_group, topk_group, two_best)
        given = [self.place(zones, tensor) for tensor in (bias, indices)]
        self.run(zones, self.module.route, router, *selection, *given, *map(address, outputs))
        return tuple(outputs)

    def route_backward(self, grad_weights, logits, indices, score, normalize, eps, scale):
        zones = Redzones()
        grad = zones.output(*logits.shape, dtype=logits.dtype, offset=self.offset)
        router = self.router(zones, logits, indices.shape[1], score, normalize, eps, scale)
        given = [self.place(zones, tensor) for tensor in (indices, grad_weights)]
        self.run(zones, self.module.route_backward, router, *given, address(grad))
        return grad

    def router(self, zones, logits, top_k, score, normalize, eps, scale):
        place = self.place(zones, logits)
        return self.module.Router(
            ELEMENTS.index(logits.dtype), place, *logits.shape, top_k, score, normalize, eps, scale
        )

    def place(self, zones, tensor):
        return 0 if tensor is None else address(zones.input(tensor, offset=self.offset))

    def run(self, zones, launch, *arguments):
        assert launch(*arguments) == 0
        zones.check()


def address(tensor):
    return tensor.data_ptr()
