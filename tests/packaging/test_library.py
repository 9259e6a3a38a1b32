"""The compiled library as a file: what it needs, what it exports, which architectures it holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import r1kernels
from r1kernels import extension
from tests.support import fresh

AUDIT = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


@pytest.fixture
def library():
    (found,) = Path(r1kernels.__file__).parent.glob(f"_C.{sys.implementation.cache_tag}*.so")
    return found


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_needs_torch_and_the_system_alone_and_holds_no_absolute_path(library):
    if not shutil.which("readelf"):
        pytest.skip("readelf (binutils) is not installed")
    dynamic = output("readelf", "-d", library)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    system = {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
    }
    loader = {name for name in needed if name.startswith("ld-linux")}
    assert needed - system - loader == {"libtorch.so", "libtorch_cpu.so"}
    paths = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "PATH)" in line]
    assert paths == ["$ORIGIN/../torch/lib"]


def test_it_uses_nothing_of_torch_but_the_stable_abi(library):
    pytest.importorskip("torch_abi_audit", reason="torch-abi-audit is not installed")
    text = output(sys.executable, "-c", AUDIT, "--check", "torch", library)
    assert "Torch ABI:   STABLE" in text and "unstable=0" in text and "Min torch:   2.10.0" in text


def test_it_exports_its_module_and_no_kernel(library):
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    symbols = [line.split()[-1] for line in output("nm", "-D", "--defined-only", library).splitlines()]
    assert "PyInit__C" in symbols
    assert not [name for name in symbols if "r1kernels" in name or "cuda" in name.lower()]


def test_it_holds_binaries_for_the_architectures_that_it_names(library):
    if not extension.cuda_architectures():
        pytest.skip(str(extension.cuda_missing()))
    triton = pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binaries = output(tool, "--list-elf", library)
    held = {line.rsplit(".sm_", 1)[1].removesuffix(".cubin") for line in binaries.splitlines()}
    assert held == set(extension.cuda_architectures())
    assert {"80", "90"} <= held
    # PTX of the newest, for devices that come later
    assert f"sm_{extension.cuda_architectures()[-1]}.ptx" in output(tool, "--list-ptx", library)


def test_it_imports_and_computes_where_there_is_no_device_and_loads_no_driver():
    program = """
import torch, r1kernels
from r1kernels import extension
assert extension.missing() is None, extension.missing()
assert r1kernels.token_logprobs(torch.zeros(1, 2), torch.tensor([0]), backend="cpu").item() < 0
maps = open("/proc/self/maps").read()
print([name for name in ("libcuda.so", "libcudart.so") if name in maps])
"""
    result = fresh.run(program, {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr
    if "+cpu" in extension.build_info()["torch"]:
        assert result.stdout.strip() == "[]"
