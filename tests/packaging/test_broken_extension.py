"""A missing or broken library never breaks `import r1kernels`: the reason is kept, shown, and names both sides."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import r1kernels
from r1kernels import extension
from tests.support import fresh

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
USE = """
import torch, r1kernels
from r1kernels import __main__, extension
print(extension.missing())
logp = r1kernels.token_logprobs(torch.zeros(1, 4), torch.tensor([1]))
print(f"{logp.item():.4f}")
try:
    r1kernels.token_logprobs(torch.zeros(1, 4), torch.tensor([1]), backend="cpu")
except r1kernels.BackendError as error:
    print(error)
print(__main__.report())
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its library."""
    copy = tmp_path / "r1kernels"
    shutil.copytree(
        Path(r1kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return copy


@pytest.fixture
def assert_reported(package):
    """The reference serves, the cpu backend refuses with the reason, and the report shows it."""

    def check(*texts):
        result = fresh.run(USE, path=package.parent)
        assert result.returncode == 0, result.stderr
        failure, value, refusal, report = result.stdout.split("\n", 3)
        for text in texts:
            assert text in failure
        assert value == "-1.3863"  # -log 4
        assert failure in refusal
        assert failure in report

    return check


def shared_library(package, name, source):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", package / name],
        input=source,
        text=True,
        check=True,
    )


def test_not_built(assert_reported):
    assert_reported("r1kernels._C is not there", "R1KERNELS_NO_EXTENSION=1")


def test_not_a_library(package, assert_reported):
    (package / f"_C{SUFFIX}").write_bytes(b"no library")
    assert_reported(f"_C{SUFFIX}", "did not load: ImportError")


def test_another_torch(package, assert_reported):
    source = """
extern void torch_function_of_another_version(void);
const char record[] = "r1kernels-build{torch=2.99.0+cu999,python=%s}";
void *PyInit__C(void) { torch_function_of_another_version(); return 0; }
"""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    shared_library(package, f"_C{SUFFIX}", source % here)
    assert_reported(
        "torch ABI mismatch",
        "built against torch 2.99.0+cu999",
        f"this is torch {torch.__version__}",
        "torch_function_of_another_version",
    )


def test_another_python(package, assert_reported):
    shared_library(
        package,
        "_C.cpython-399-x86_64-linux-gnu.so",
        'const char record[] = "r1kernels-build{torch=2.13.0,python=3.99}";',
    )
    assert_reported("was built for Python 3.99", f"this is Python 3.{sys.version_info.minor}")


# what a later version of r1kernels declares beside its other ops
LATER = """
from typing import NamedTuple
import torch
from r1kernels.op import Kernel
class LaterCall(NamedTuple):
    tensor: torch.Tensor
def _shapes(call: LaterCall) -> torch.Tensor:
    return torch.empty_like(call.tensor)
Kernel("later", LaterCall, _shapes)
"""


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_built_from_older_sources(package, assert_reported):
    shutil.copy(str(extension._find()), package)
    with open(package / "moe" / "__init__.py", "a") as file:
        file.write(LATER)
    assert_reported("the extension has no later_cpu", "older sources", "reinstall r1kernels")
