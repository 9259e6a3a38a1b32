"""The cpu backend of grpo_loss and group_advantages: csrc/grpo, in C++ with vector instructions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import devices

DTYPES = (*devices.FLOATS, torch.bool)  # of log-probs and rewards, on every kernel backend


def reasons(values: Tensor, *unused: object, **unused_too: object) -> tuple[str, ...]:
    """Why this call can not be served; ``values`` are the log-probs, or the rewards."""
    return tuple(devices.cpu("tensors", values, DTYPES))
