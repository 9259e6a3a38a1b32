"""What every CUDA kernel in the library needs on its GPU, read from the machine code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import r1kernels
from r1kernels import extension

pytestmark = pytest.mark.skipif(extension.cuda_missing() is not None, reason=str(extension.cuda_missing()))


@pytest.fixture
def inspect():
    """inspect(option, ...): what cuobjdump, which comes with Triton, prints about the library."""
    triton = pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (library,) = Path(r1kernels.__file__).parent.glob(f"_C.{sys.implementation.cache_tag}*.so")

    def run(*options):
        command = [str(tool), *options, str(library)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return run


def test_no_kernel_spills(inspect):
    usage = inspect("-res-usage")
    kernels = re.findall(r"Function (\S+):\n.*?REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    for name, registers, stack, shared, local in kernels:
        assert int(stack) == 0 and int(local) == 0, f"{name} spills"
        assert int(shared) <= 48 << 10, f"{name} has more static shared memory than a block gets unasked"
        assert int(registers) <= 255
    architectures = [name for name in extension.cuda_architectures() if name.isdigit()]
    token_logprobs = [name for name, *_ in kernels if "logprob" in name and "_kernel" in name]
    # forward and backward, three dtypes each, for every architecture
    assert len(token_logprobs) >= 6 * len(architectures)


def test_no_kernel_of_token_logprobs_touches_local_memory(inspect):
    """Local memory is where registers that do not fit, and arrays with a moving index, end up."""
    for architecture in extension.cuda_architectures():
        code = inspect("-sass", "-arch", f"sm_{architecture}")
        functions = code.split("Function : ")[1:]
        assert functions or architecture == "90a"
        for function in functions:
            if "logprob" in function.splitlines()[0]:
                assert not re.search(r"\b(LDL|STL)\b", function), function.splitlines()[0]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_aligned_rows_are_read_16_bytes_at_a_time(inspect, direction):
    code = inspect("-sass", "-arch", "sm_80")
    functions = [
        text
        for text in code.split("Function : ")[1:]
        if f"logprob{len(direction) + 7}{direction}_kernel" in text
    ]
    assert len(functions) == 3
    assert all("LDG.E.128" in text for text in functions)
