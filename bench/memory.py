"""Memory of one call: the peak above what was there before it, and the bytes that autograd keeps for the backward."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from r1kernels import extension

_STATUS = Path("/proc/self/status")


class Peak:
    """Bytes at the peak inside the ``with`` block above those before it; None where the system cannot tell.

    On a CPU it is the resident memory of the process, so that scratch outside of torch counts too; buffers that r1kernels
    keeps for its next call are given back before.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.bytes: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        # freed heap pages and kept buffers go back to the system, so that reusing them is seen
        extension.release()
        ctypes.CDLL(None).malloc_trim(0)
        self._counting = _reset_peak()
        self._before = _bytes(_STATUS, "VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif self._counting:
            self.bytes = max(_bytes(_STATUS, "VmHWM") - self._before, 0)


class Saved:
    """Counts what is saved for the backward, each storage once; ``without`` (parameters, by the contract) is left out."""

    def __init__(self, without: list[Tensor]) -> None:
        self._seen = {tensor.untyped_storage()._cdata for tensor in without}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def counting_saved(without: list[Tensor]) -> Iterator[Saved]:
    """Count the bytes that forwards inside the ``with`` block keep."""
    saved = Saved(without)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return _bytes(Path("/proc/meminfo"), "MemAvailable")


def _reset_peak() -> bool:
    """Set the high-water mark of the process to what it holds now; False where the system does not let it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _bytes(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path}: expected a line {name}")
