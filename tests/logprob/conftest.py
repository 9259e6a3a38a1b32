"""Where the log-prob tests run: every backend that this machine can run, on its device."""

from __future__ import annotations

import functools

import pytest
import torch

import r1kernels
from r1kernels import examples

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))
PLACES = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=GPU),
    pytest.param(("triton", "cuda"), id="triton", marks=GPU),
    pytest.param(("cuda", "cuda"), id="cuda", marks=GPU),
]


@functools.cache
def refusal(op, backend, device):
    """Why the op does not run there."""
    args, kwargs = examples.calls(device)[op]
    try:
        getattr(r1kernels, op)(*args, **kwargs, backend=backend)
    except (r1kernels.BackendError, ValueError) as error:
        return str(error)
    return None


@pytest.fixture(params=PLACES)
def place(request):
    """(backend, device) for the op that the test file names as OP; skips where it cannot run."""
    reason = refusal(request.module.OP, *request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param
