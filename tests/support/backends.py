"""The backends that the tests of attention and MoE ops run on. A kernel backend for another device adds its name here."""

from __future__ import annotations

import pytest

import r1kernels
from r1kernels import extension


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """The name of a backend, preferred for every op inside the test (a call in float64 goes to the reference)."""
    if request.param == "cpu" and extension.missing() is not None:
        pytest.skip(str(extension.missing()))
    with r1kernels.use_backend(request.param):
        yield request.param
