"""The cuda backend of token_logprobs: csrc/logprob/cuda.cuh, in C++ for NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # the capability of sm_80

_missing = extension.cuda_missing()  # read once: torch.compile can not trace a call into the extension


def reasons(logits: Tensor, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``autograd.run``)."""
    found = []
    if logits.device.type != "cuda":
        found.append(f"the logits are on {logits.device}, this backend is for NVIDIA GPUs")
    elif older_than_supported(logits.device.index):
        found.append(f"{logits.device} is older than sm_80")
    if logits.dtype not in DTYPES:
        found.append(f"{str(logits.dtype).removeprefix('torch.')} logits are served by the reference alone")
    if _missing:
        found.append(_missing)
    return tuple(found)


def older_than_supported(device: int) -> bool:
    """Whether a CUDA device is too old for the kernels."""
    # torch.compile takes the properties, not the capability, for constants
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) < OLDEST
