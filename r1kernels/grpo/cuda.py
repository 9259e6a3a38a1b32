"""The cuda backend of grpo_loss and group_advantages: csrc/grpo, in C++ for NVIDIA GPUs."""

from __future__ import annotations

from torch import Tensor

from .. import devices
from .cpu import DTYPES


def reasons(values: Tensor, *unused: object, **unused_too: object) -> tuple[str, ...]:
    """Why this call can not be served; ``values`` are the log-probs, or the rewards."""
    return tuple(devices.cuda("tensors", values, DTYPES))
