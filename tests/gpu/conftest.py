"""The kernel backends that a GPU can have, for every test that takes ``backend``."""

from __future__ import annotations

import pytest

from r1kernels import extension


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if request.param == "cuda" and extension.cuda_missing():
        pytest.skip(extension.cuda_missing())
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return request.param
