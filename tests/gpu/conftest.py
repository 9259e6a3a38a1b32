"""The kernel backends that a GPU can have, for every test that takes ``backend``, and room for the large tests."""

from __future__ import annotations

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch

from r1kernels import extension

LARGE_BYTES = 48 << 30  # that a test marked "large" may need


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if request.param == "cuda" and extension.cuda_missing():
        pytest.skip(extension.cuda_missing())
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return request.param


@pytest.fixture(autouse=True)
def room_on_the_gpu(request):
    """One large test at a time, whatever processes share the device; what it allocated goes back."""
    if not request.node.get_closest_marker("large"):
        yield
        return
    with Path(tempfile.gettempdir(), "r1kernels-large-test.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < LARGE_BYTES:
            pytest.skip(f"needs {LARGE_BYTES >> 30} GiB of free GPU memory, {free >> 30} GiB are free")
        yield
        torch.cuda.empty_cache()
