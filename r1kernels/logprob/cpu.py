"""The cpu backend of token_logprobs: csrc/logprob/cpu.cpp, in C++ with vector instructions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons(logits: Tensor, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``autograd.run``)."""
    found = []
    if logits.device.type != "cpu":
        found.append(f"the logits are on {logits.device}, this backend is for the CPU")
    if logits.dtype not in DTYPES:
        found.append(f"{str(logits.dtype).removeprefix('torch.')} logits are served by the reference alone")
    failure = extension.missing()
    if failure:
        found.append(failure)
    return tuple(found)
