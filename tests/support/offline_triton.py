"""Compiles Triton kernels for a GPU that is not there, and reads what they need from the machine code.

A driver that names the wanted target makes Triton specialise and compile as a launch on that GPU would.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

# bytes of shared memory that a block may have
SHARED_BYTES = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
}
CAPABILITIES = {number: divmod(number, 10) for number in SHARED_BYTES}
# the tensor cores' instruction for tiles of 64 rows and more; fewer rows, and other GPUs, take HMMA
WIDE_PRODUCTS = {90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class OfflineDriver(DriverBase):
    """Stands for a GPU of one capability. Triton keeps compiled kernels by the device index."""

    def __init__(self, capability: int, device: int) -> None:
        self.capability, self.device = capability, device

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched here")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> None:
        raise NotImplementedError("nothing is launched here")

    def get_benchmarker(self) -> None:
        raise NotImplementedError("nothing is launched here")


@contextmanager
def compile_only(capability: int) -> Iterator[list]:
    """Inside the block, launches compile for this capability (90: sm_90) and run nothing; yields the compiled kernels."""
    with launched_on(OfflineDriver(capability, device=capability)) as compiled:
        yield compiled


@contextmanager
def specialise_only(capability: int) -> Iterator[list]:
    """Inside the block, launches compile and run nothing; yields what each would compile, a name and Triton's key of it."""
    keys, runtime = [], triton.knobs.runtime

    def note(*, key, fn, **_):
        keys.append((fn.name, key))
        return True  # do not compile

    with launched_on(OfflineDriver(capability, device=-capability)), runtime.scope():
        runtime.jit_cache_hook = note
        yield keys


@contextmanager
def launched_on(driver: OfflineDriver) -> Iterator[list]:
    compiled = []
    run, active = (
        triton.JITFunction.run,
        triton.runtime.driver._active,
    )  # the public property would look for a GPU

    def compile_instead(self, *args, grid, warmup, **kwargs):
        # Triton's own choice of whether a product and a sum are rounded once changes with its version
        assert kwargs.get("enable_fp_fusion") is True, f"{self.fn.__name__}: fusion is left to Triton"
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.driver.set_active(driver)
    triton.JITFunction.run = compile_instead
    try:
        yield compiled
    finally:
        triton.JITFunction.run = run
        triton.runtime.driver._active = active


@dataclass(frozen=True)
class Resources:
    cubin: Path
    registers: int
    stack_bytes: int
    shared_bytes: int

    @functools.cached_property
    def instructions(self) -> str:
        return cuobjdump("-sass", self.cubin)

    @property
    def spill_instructions(self) -> int:
        """They go to the stack: where there is none, a quarter of a second of disassembling is saved."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.instructions)) if self.stack_bytes else 0

    def widest_load_bits(self) -> int:
        """Of the loads from global memory."""
        widths = re.findall(r"\bLDG\.E(?:\.\w+)*?\.(64|128)\b", self.instructions)
        return max(map(int, widths), default=32)


def serialised(instructions: str) -> int:
    """The wgmma instructions behind which the next one waits for the end of all."""
    products = re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d)", instructions)
    return sum(
        (product, wait, following) == ("HGMMA", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "HGMMA")
        for product, wait, following in zip(products, products[1:], products[2:], strict=False)
    )


@functools.cache
def resources(compiled, folder: Path) -> Resources:
    """What a compiled kernel needs on its GPU."""
    cubin = folder / f"{compiled.name}-{compiled.hash}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = cuobjdump("-res-usage", cubin)
    needs = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(cubin, needs["REG"], needs["STACK"] + needs["LOCAL"], compiled.metadata.shared)


def cuobjdump(option: str, cubin: Path) -> str:
    command = [str(TOOLS / "cuobjdump"), option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
