"""Why a kernel backend cannot run where an argument lies, or in its dtype: sentences for ``backends.register``.

Triton is looked for, not imported. With TRITON_INTERPRET=1, Triton's own switch, its kernels run in its interpreter, which
serves tensors on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import extension

# float32, which kernels compute in, holds all of them exactly
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # the capability of sm_80
_MMA_SYNC_IS_SLOW = (9, 10, 11)  # majors whose tensor cores reach their rate by wgmma or tcgen05 alone

# read ahead: torch.compile cannot trace a call into the extension
_no_cpu, _no_cuda = extension.missing(), extension.cuda_missing()
_BUILT = sorted(divmod(int(name), 10) for name in extension.cuda_architectures() if name.isdigit())
# majors with grouped products of their own
_NATIVE = {9} if "90a" in extension.cuda_architectures() else set()
_NO_TRITON = None if importlib.util.find_spec("triton") else "the package triton is not installed"
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_gpus: dict[int, Any] = {}
_ready: set[int] = set()  # the GPUs that are known to run the extension's CUDA kernels
SERVED = {"cuda": ("cuda",), "triton": ("cuda", "cpu") if _INTERPRETED else ("cuda",), "cpu": ("cpu",)}
"""The types of the devices whose tensors a backend may serve; the first is the one that its kernels are for."""


def ask_extension() -> None:
    """Reads again why the extension cannot be used."""
    global _no_cpu, _no_cuda
    _no_cpu, _no_cuda = extension.missing(), extension.cuda_missing()


def out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says that a GPU or the CPU has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def cpu(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> list[str]:
    """Why the C++ kernels for CPUs cannot take ``tensor``, the argument ``name``."""
    if tensor.is_cpu and tensor.dtype in dtypes and not _no_cpu:  # as most are
        return []
    found = [] if tensor.is_cpu else [f"{name}: on {tensor.device}, this backend is for the CPU"]
    return found + _common(name, tensor, dtypes, _no_cpu)


def cuda(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> list[str]:
    """Why the C++ kernels for NVIDIA GPUs cannot take ``tensor``, the argument ``name``."""
    if tensor.is_cuda and tensor.device.index in _ready and tensor.dtype in dtypes:  # as most are
        return []
    if not tensor.is_cuda:
        found = [f"{name}: on {tensor.device}, this backend is for NVIDIA GPUs"]
    else:
        found = _too_old(tensor) or ([] if _no_cuda else _not_loaded(tensor))
        if not (found or _no_cuda or torch.compiler.is_compiling()):
            _ready.add(tensor.device.index)
    return found + _common(name, tensor, dtypes, _no_cuda)


def grouped_products_yield(tensor: Tensor) -> str:
    """Why the grouped products of cuda are better left to Triton on the GPU of ``tensor``; empty: they are not."""
    if _no_cuda or _NO_TRITON or not tensor.is_cuda or tensor.dtype not in (torch.bfloat16, torch.float16):
        return ""
    major = _gpu(tensor).major
    if major not in _MMA_SYNC_IS_SLOW or major in _NATIVE:
        return ""
    without = "the extension was built without the wgmma kernels, for which it needs CUTLASS"
    cause = without if major == 9 else "cuda has no tcgen05 kernels"
    return f"{cause}: its portable ones reach a part of the rate of Triton's on {tensor.device}"


def triton(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> list[str]:
    """Why the Triton kernels cannot take ``tensor``, the argument ``name``."""
    if tensor.is_cuda:
        found = _too_old(tensor)
    else:
        found = (
            _not_interpreted(name, tensor)
            if _INTERPRETED
            else [f"{name}: on {tensor.device}, Triton needs a GPU"]
        )
    return found + _common(name, tensor, dtypes, _NO_TRITON)


def memory_budget(tensor: Tensor, on_cpu: int) -> int:
    """Bytes that an op may take beside its arguments and results: a sixteenth of a GPU's memory, ``on_cpu`` on a CPU.

    Of all memory, not of what is free: what is chosen by it, and with it the last bits, stays the same from call to call.
    """
    if not tensor.is_cuda:
        return on_cpu
    return max(int(_gpu(tensor).total_memory) // 16, on_cpu)


def _not_interpreted(name: str, tensor: Tensor) -> list[str]:
    """Why Triton's interpreter cannot take ``tensor``."""
    if _NO_TRITON or tensor.dtype != torch.bfloat16:
        return []
    from . import triton_interpreter

    if triton_interpreter.multiplies_bfloat16():
        return []
    return [f"{name}: bfloat16, whose raw bits Triton's interpreter multiplies"]


def _gpu(tensor: Tensor) -> Any:
    """The properties of the GPU of ``tensor``, for which torch is asked once: every call of every op wants them."""
    index = tensor.device.index
    if torch.compiler.is_compiling():  # it takes the properties, not the capability, for constants
        return torch.cuda.get_device_properties(index)
    if index not in _gpus:
        _gpus[index] = torch.cuda.get_device_properties(index)
    return _gpus[index]


def _too_old(tensor: Tensor) -> list[str]:
    properties = _gpu(tensor)
    old = (properties.major, properties.minor) < OLDEST
    return [f"{tensor.device} is older than sm_{OLDEST[0]}{OLDEST[1]}"] if old else []


def _not_loaded(tensor: Tensor) -> list[str]:
    """Why the extension's CUDA kernels cannot run on the GPU of ``tensor``.

    A binary runs on its major from its minor on, and the newest architecture is there as PTX too, which later ones translate.
    """
    properties = _gpu(tensor)
    here = (properties.major, properties.minor)
    if here < _BUILT[-1] and not any(built[0] == here[0] and built <= here for built in _BUILT):
        names = ", ".join(f"sm_{major}{minor}" for major, minor in _BUILT)
        return [f"{tensor.device} is an sm_{here[0]}{here[1]}, the extension was built for {names}"]
    problem = extension.cuda_problem(tensor.device.index or 0)
    return [f"{tensor.device} cannot run the extension's CUDA kernels: {problem}"] if problem else []


def _common(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], missing: str | None) -> list[str]:
    found = []
    if tensor.dtype not in dtypes:
        found.append(f"{name}: {str(tensor.dtype).removeprefix('torch.')} is served by the reference alone")
    if missing:
        found.append(missing)
    return found
