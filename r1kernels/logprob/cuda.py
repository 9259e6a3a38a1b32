"""The cuda backend of token_logprobs: csrc/logprob/cuda.cuh, in C++ for NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from . import autograd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons(logits: Tensor, *unused: object) -> tuple[str, ...]:
    """Why this call can not be served (arguments of ``run``)."""
    found = []
    if logits.device.type != "cuda":
        found.append(f"the logits are on {logits.device}, this backend is for NVIDIA GPUs")
    if logits.dtype not in DTYPES:
        found.append(f"{str(logits.dtype).removeprefix('torch.')} logits are served by the reference alone")
    failure = extension.cuda_missing()
    if failure:
        found.append(failure)
    return tuple(found)


def run(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy (both (N,)) of logits (B, T, V); see ``ops.py`` for the arguments and ``autograd.run``."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if temperatures is not None:
        temperatures = temperatures.float()
    return autograd.run("cuda", logits, targets, temperatures, temperature, ignore_index, entropy, inplace_backward)
