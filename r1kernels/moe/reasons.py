"""Why a kernel backend of the MoE ops can not serve a call; the same limits hold for all of them.

The first argument is the function of devices.py for the backend, the others are those that the public op gives to its
backends. The balance losses and the update of the router bias have no kernel: they are a handful of passes over (T, E) or
(E,), once a layer or step, that plain PyTorch makes in a fraction of the router's time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import devices

Device = Callable[..., list[str]]

_MOST_ROWS = 2**31 - 1
_MOST_EXPERTS = 2048  # whose scores a GPU holds in registers


def route(device: Device, logits: Tensor, *unused: object) -> tuple[str, ...]:
    return (*device("logits", logits), *_too_many_experts(device, logits.shape[1]))


def sort_by_expert(device: Device, indices: Tensor, *unused: object) -> tuple[str, ...]:
    return (*device("indices", indices, (torch.int64,)), *_too_many(indices.numel()))


def grouped_gemm(device: Device, x: Tensor, weight: Tensor, *unused: object) -> tuple[str, ...]:
    return (*device("x", x), *_too_many(x.shape[0]), *_empty(weight))


def moe_experts(
    device: Device, hidden: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, *unused: object
) -> tuple[str, ...]:
    return (*device("hidden", hidden), *_too_many(indices.numel()), *_empty(gate_up))


def _too_many_experts(device: Device, experts: int) -> tuple[str, ...]:
    if device is devices.cpu or experts <= _MOST_EXPERTS:
        return ()
    return (f"{experts} experts are more than the {_MOST_EXPERTS} that a GPU kernel chooses from",)


def _too_many(rows: int) -> tuple[str, ...]:
    if rows <= _MOST_ROWS:
        return ()
    return (f"{rows} routed rows are more than the {_MOST_ROWS} that kernels count",)


def _empty(weight: Tensor) -> tuple[str, ...]:
    return ("matrices without elements are served by the reference alone",) if 0 in weight.shape else ()
