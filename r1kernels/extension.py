"""The compiled library ``r1kernels._C``: loaded once, here; where it is missing or broken, the reason is kept.

Importing it registers the CPU and CUDA implementations of the torch ops. Nothing here ever raises: a backend asks
``missing()`` and refuses with that sentence, and ``python -m r1kernels`` shows it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import platform
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import torch

_NAME = "r1kernels._C"
_LARGE_BYTES = 1 << 20
_RECORD = re.compile(rb"r1kernels-build\{torch=([^,}]*),python=([^,}]*)\}")


def _find() -> Path | None:
    """The library's file, loadable or not."""
    folder = Path(__file__).parent
    fitting = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for path in [*fitting, *sorted(folder.glob("_C.*.so"))] if path.is_file()), None)


def _diagnose(error: Exception) -> str:
    """Why the library did not load, in one sentence that names both sides of a mismatch."""
    path = _find()
    if path is None:
        return (
            "the extension r1kernels._C is not there: r1kernels was installed without a C++ compiler or with "
            "R1KERNELS_NO_EXTENSION=1"
        )
    record = _RECORD.search(path.read_bytes())
    built_torch, built_python = (
        (part.decode() for part in record.groups()) if record else ("unknown", "unknown")
    )
    here = ".".join(platform.python_version_tuple()[:2])
    if built_python not in ("unknown", here):
        return f"the extension {path.name} was built for Python {built_python}, this is Python {here}: reinstall r1kernels"
    if "undefined symbol" in str(error):
        return (
            f"torch ABI mismatch: the extension was built against torch {built_torch}, this is torch "
            f"{torch.__version__}: reinstall r1kernels ({error})"
        )
    return f"the extension {path.name} (built against torch {built_torch}) did not load: {type(error).__name__}: {error}"


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(_NAME), None
    except Exception as error:  # a library can fail in many ways, and none may break `import r1kernels`
        return None, _diagnose(error)


_module, _failure = _load()
_problems: dict[int, str] = {}
_build_info: dict[str, str] = {} if _module is None else _module.build_info()


def missing() -> str | None:
    """Why the extension cannot be used, or None where it is loaded."""
    return _failure


def expect(ops: Iterable[tuple[str, str]]) -> None:
    """Refuse the loaded library, with a warning, if it lacks one of these torch ops for its dispatch key ("CPU" or "CUDA")."""
    global _failure
    if _failure is not None:
        return
    built = ("CPU", "CUDA") if cuda_architectures() else ("CPU",)
    for op, key in ops:
        if key in built and not torch._C._dispatch_has_kernel_for_dispatch_key(f"r1kernels::{op}", key):
            _failure = f"the extension has no {op}, for it was built from older sources: reinstall r1kernels"
            warnings.warn(f"{_failure}; plain PyTorch computes until then", RuntimeWarning, stacklevel=2)
            return


def cuda_missing() -> str | None:
    """Why the CUDA kernels of the extension cannot be used, or None where they were built."""
    if _failure is None and not cuda_architectures():
        return "the extension was built without CUDA kernels: no nvcc was found, or R1KERNELS_CUDA=OFF"
    return _failure


def build_info() -> dict[str, str]:
    """What the library was built with (keys: torch, python, compiler, cpu_isas, cuda, cuda_architectures), or {}."""
    return dict(_build_info)


def cuda_architectures() -> tuple[str, ...]:
    """The CUDA architectures inside the library, such as "80" or "90a"."""
    return tuple(_build_info.get("cuda_architectures", "").split())


def cuda_problem(device: int) -> str:
    """What the driver says against the library's CUDA kernels on a device, or "": it is asked once a process and device.

    It knows what no list of architectures does: a driver that is older than the CUDA runtime inside the library.
    """
    if device not in _problems and not torch.compiler.is_compiling():  # which cannot trace the question
        _problems[device] = "" if _module is None else str(_module.cuda_problem(device))
    return _problems.get(device, "")


def supported_isas() -> tuple[str, ...]:
    """The CPU instruction sets that were built and that this processor has, weakest first."""
    return () if _module is None else tuple(_module.supported_isas())


def chosen_isa() -> str:
    """The instruction set of the CPU kernels: the strongest supported one, or what R1KERNELS_CPU_ISA names.

    Raises:
        RuntimeError: the extension is missing, or R1KERNELS_CPU_ISA names an unknown or unsupported instruction set.
    """
    if _module is None:
        raise RuntimeError(_failure)
    return str(_module.chosen_isa())


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, not initialised. The memory of a large one is kept for the next one once it is free.

    At most a sixteenth of the machine's memory is kept, or 512 MiB (csrc/common/pages.h): a fresh buffer is paid in page
    faults.
    """
    size = torch.Size(shape).numel()
    if _module is None or size * dtype.itemsize < _LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_module.Pages(size * dtype.itemsize), dtype=dtype).view(shape)


def release() -> None:
    """Give what ``empty`` keeps back to the system."""
    if _module is not None:
        _module.Pages.release()


def cpu_features() -> tuple[str, ...]:
    """The features of this processor that the CPU kernels look for."""
    return () if _module is None else tuple(_module.cpu_features())
