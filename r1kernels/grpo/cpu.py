"""The cpu backend of grpo_loss and group_advantages: csrc/grpo, in C++ with vector instructions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool)

_missing = extension.missing()  # read once: torch.compile can not trace a call into the extension


def reasons(values: Tensor, *unused: object, **unused_too: object) -> tuple[str, ...]:
    """Why this call can not be served; ``values`` are the log-probs, or the rewards."""
    found = []
    if not values.is_cpu:
        found.append("this backend is for tensors on the CPU")
    found += dtype_reasons(values)
    if _missing:
        found.append(_missing)
    return tuple(found)


def dtype_reasons(values: Tensor) -> list[str]:
    """Why no kernel serves the dtype of ``values``: they compute in float32, which holds those of ``DTYPES`` exactly."""
    if values.dtype in DTYPES:
        return []
    return [f"{str(values.dtype).removeprefix('torch.')} is served by the reference alone"]
