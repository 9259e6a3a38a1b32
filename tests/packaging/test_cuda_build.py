"""What every CUDA kernel in the library needs on its GPU, read from the machine code."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import r1kernels
from r1kernels import extension

pytestmark = pytest.mark.skipif(extension.cuda_missing() is not None, reason=str(extension.cuda_missing()))


@pytest.fixture(scope="module")
def inspect():
    """inspect(option, ...): what cuobjdump, which comes with Triton, prints about the library."""
    triton = pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (library,) = Path(r1kernels.__file__).parent.glob(f"_C.{sys.implementation.cache_tag}*.so")

    @functools.cache
    def run(*options):
        command = [str(tool), *options, str(library)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return run


def test_no_kernel_spills(inspect):
    usage = inspect("-res-usage")
    kernels = re.findall(r"Function (\S+):\n.*?REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    families = [
        family for family in ("logprob", "grpo", "moe") if any(family in name for name, *_ in kernels)
    ]
    assert families == ["logprob", "grpo", "moe"]
    for name, registers, stack, shared, local in kernels:
        assert int(stack) == 0 and int(local) == 0, f"{name} spills"
        assert int(shared) <= 48 << 10, f"{name} has more static shared memory than a block gets unasked"
        assert int(registers) <= 255


# of the log-prob ops in every architecture: kernels by dtype (the gradient of float32 logits may be narrower) and mode, and
# the most registers that three blocks of 256 threads, or two in the general mode, leave to a thread
LOGPROB_KERNELS = {"forward": 3 * 3, "backward": (3 + 2) * 3, "merge": 3}
REGISTERS = {"0": 80, "1": 80, "2": 128}


def test_every_architecture_holds_every_kernel_of_the_log_prob_ops(inspect):
    for architecture, usage in usage_by_architecture(inspect):
        for direction, count in LOGPROB_KERNELS.items():
            name = f"{direction}_kernel"
            found = re.findall(rf"Function (\S*logprob{len(name)}{name}\S*):\n.*?REG:(\d+)", usage)
            assert len(found) == count, (architecture, direction)
            for mangled, registers in found:
                mode = re.search(r"ModeE(\d)", mangled)
                assert mode is None or int(registers) <= REGISTERS[mode.group(1)], mangled


def portable_architectures():
    return [name for name in extension.cuda_architectures() if name.isdigit()]


def usage_by_architecture(inspect):
    """(architecture, what each kernel uses there)"""
    found = re.split(r"^arch = sm_", inspect("-res-usage"), flags=re.MULTILINE)[1:]
    for architecture in portable_architectures():
        yield architecture, "".join(text for text in found if text.splitlines()[0] == architecture)


# Disassembling all of them takes a minute: every day the first is read, and what each kernel of all of them needs (above).
READ = [
    pytest.param(name, marks=pytest.mark.slow if place else [])
    for place, name in enumerate(portable_architectures())
]


@pytest.mark.parametrize("architecture", READ)
def test_no_kernel_of_the_log_prob_ops_touches_local_memory(inspect, architecture):
    """Local memory is where registers that do not fit, and arrays with a moving index, end up."""
    code = inspect("-sass", "-arch", f"sm_{architecture}")
    functions = [text for text in code.split("Function : ")[1:] if "logprob" in text.splitlines()[0]]
    assert len(functions) >= sum(LOGPROB_KERNELS.values())
    for function in functions:
        assert not re.search(r"\b(LDL|STL)\b", function), function.splitlines()[0]


@pytest.mark.parametrize(("direction", "stores"), [("forward", False), ("backward", True)])
def test_aligned_rows_move_16_bytes_at_a_time(inspect, direction, stores):
    name = f"{direction}_kernel"
    functions = inspect("-sass", "-arch", f"sm_{portable_architectures()[0]}").split("Function : ")[1:]
    found = [text for text in functions if f"logprob{len(name)}{name}" in text.splitlines()[0]]
    assert len(found) == LOGPROB_KERNELS[direction]
    for text in found:
        assert "LDG.E.128" in text
        narrower = re.search(r"kernelIf(13__nv_bfloat16|6__half)", text.splitlines()[0])
        assert not stores or ("STG.E.64" if narrower else "STG.E.128") in text


# of the grouped products: by element and tile (128 or 64 rows of 16 bits, 64 of float32), for each of four kinds of products
# over rows, and one gradient of the weights by element
MOE_KERNELS = {"rows": (2 * 2 + 1) * 4, "weights": 3, "combine": 3, "sum_partials": 1, "schedule": 1}


def test_every_architecture_holds_every_kernel_of_the_grouped_products(inspect):
    for architecture, usage in usage_by_architecture(inspect):
        for kind, count in MOE_KERNELS.items():
            name = f"{kind}_kernel"
            assert len(re.findall(rf"Function \S*3moe{len(name)}{name}", usage)) == count, (
                architecture,
                kind,
            )


@pytest.mark.parametrize("architecture", READ)
@pytest.mark.parametrize("kind", ["rows", "weights"])
def test_products_of_16_bits_run_on_tensor_cores_and_those_of_float32_do_not(inspect, kind, architecture):
    name = f"3moe{len(kind) + 7}{kind}_kernelI"
    functions = inspect("-sass", "-arch", f"sm_{architecture}").split("Function : ")[1:]
    found = {text.splitlines()[0]: text for text in functions if name in text.splitlines()[0]}
    assert len(found) == MOE_KERNELS[kind]
    for mangled, code in found.items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{mangled} touches local memory"
        assert "LDGSTS.E.BYPASS.128" in code, mangled
        if f"{name}f" in mangled:
            assert "FFMA" in code and "HMMA" not in code
        else:
            assert f"HMMA.16816.F32{'.BF16' if 'bfloat16' in mangled else ''}" in code and "LDSM" in code
