"""The cuda backend of grpo_loss and group_advantages: csrc/grpo, in C++ for NVIDIA GPUs."""

from __future__ import annotations

from torch import Tensor

from .. import extension
from ..logprob.cuda import older_than_supported
from .cpu import dtype_reasons

_missing = extension.cuda_missing()  # read once: torch.compile can not trace a call into the extension


def reasons(values: Tensor, *unused: object, **unused_too: object) -> tuple[str, ...]:
    """Why this call can not be served; ``values`` are the log-probs, or the rewards."""
    found = []
    if not values.is_cuda:
        found.append("this backend is for tensors on NVIDIA GPUs")
    elif older_than_supported(values.device.index):
        found.append(f"{values.device} is older than sm_80")
    found += dtype_reasons(values)
    if _missing:
        found.append(_missing)
    return tuple(found)
