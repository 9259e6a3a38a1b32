"""The cpu backend of the MoE ops: csrc/moe, in C++ with vector instructions. Why it can not serve a call.

The arguments of each function are those that the public op gives to its backends. The balance losses and the update of
the router bias have no kernel: they are a handful of passes over (T, E) or (E,), once a layer or step, that plain
PyTorch makes in a fraction of the router's time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_ROWS = 2**31 - 1


def route(logits: Tensor, *unused: object) -> tuple[str, ...]:
    return _found(logits, "logits", logits.dtype)


def sort_by_expert(indices: Tensor, *unused: object) -> tuple[str, ...]:
    return _found(indices, "indices", None, rows=indices.numel())


def grouped_gemm(x: Tensor, weight: Tensor, *unused: object) -> tuple[str, ...]:
    return _found(x, "x", x.dtype, rows=x.shape[0], sizes=weight.shape)


def moe_experts(
    hidden: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, *unused: object
) -> tuple[str, ...]:
    return _found(hidden, "hidden", hidden.dtype, rows=indices.numel(), sizes=gate_up.shape)


def _found(
    tensor: Tensor, name: str, dtype: torch.dtype | None, rows: int = 0, sizes: tuple[int, ...] = ()
) -> tuple[str, ...]:
    found = []
    if tensor.device.type != "cpu":
        found.append(f"{name} is on {tensor.device}, this backend is for the CPU")
    if dtype is not None and dtype not in DTYPES:
        found.append(f"{name} in {str(dtype).removeprefix('torch.')} is served by the reference alone")
    if rows > _MOST_ROWS:
        found.append(f"{rows} routed rows are more than the {_MOST_ROWS} that its indices count")
    if 0 in sizes:
        found.append("matrices without elements are served by the reference alone")
    failure = extension.missing()
    if failure:
        found.append(failure)
    return tuple(found)
