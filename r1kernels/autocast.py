"""Autocast, by the rule of F.linear: what it casts, and blocks without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def enabled(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device."""
    # the meta device knows no autocast; torch.amp.is_autocast_available would say so, but Dynamo before 2.12 cannot trace it
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def cast(*tensors: Any) -> tuple[Any, ...]:
    """Tensors, or None, in the autocast dtype if autocast is on for the device of the first; float64 stays."""
    device = tensors[0].device
    if not enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def off(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block in which autocast is off for the device of ``tensor``."""
    device = tensor.device
    # to enter torch.autocast costs as much as a small kernel
    return torch.autocast(device.type, enabled=False) if enabled(device) else nullcontext()
