"""`python -m r1kernels`: versions, what is built, devices, and the backend of every op."""

from __future__ import annotations

import os
import platform

import pytest
import torch

import r1kernels
from r1kernels import backends, examples, extension
from tests.support import fresh


def report(**environment):
    """What ``python -m r1kernels`` says."""
    program = "import runpy; runpy.run_module('r1kernels', run_name='__main__', alter_sys=True)"
    result = fresh.run(program, {**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_op_has_an_example_that_runs_and_can_be_explained():
    calls = examples.calls("cpu")
    assert set(calls) == set(backends.ops())
    for op, (args, kwargs) in calls.items():
        assert "runs" in backends.explain(op, *args, **kwargs)
        getattr(r1kernels, op)(*args, **kwargs)


def test_the_report_says_what_is_here():
    text = report()
    assert f"r1kernels {r1kernels.__version__}, Python {platform.python_version()}" in text
    assert f"torch {torch.__version__}" in text
    for op in backends.ops():
        assert f"  {op} (preference: auto)" in text
    if extension.missing():
        assert str(extension.missing()) in text
    else:
        assert f"runs {extension.chosen_isa()}" in text
        for architecture in extension.cuda_architectures():
            assert f"sm_{architecture}" in text
    if not torch.cuda.is_available():
        assert "  no GPU\n" in text


@pytest.mark.parametrize("preference", ["reference", "token_logprobs:reference"])
def test_the_report_follows_the_environment(preference):
    text = report(R1KERNELS_BACKEND=preference)
    part = text.split("token_logprobs (preference: reference)")[-1].split("\n  ")
    assert any(line.strip().startswith("reference") and line.endswith("runs") for line in part)
