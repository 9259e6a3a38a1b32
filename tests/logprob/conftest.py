"""Where the log-prob tests run: every backend that this machine can run, on its device."""

from __future__ import annotations

import pytest
import torch

import r1kernels
from r1kernels import examples

PLACES = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=PLACES)
def place(request):
    """(backend, device) for the op that the test file names as OP; skips where it cannot run."""
    backend, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    args, kwargs = examples.calls(device)[request.module.OP]
    try:
        getattr(r1kernels, request.module.OP)(*args, **kwargs, backend=backend)
    except (r1kernels.BackendError, ValueError) as error:
        pytest.skip(str(error))
    return backend, device
