"""Compiles Triton kernels for a GPU that is not there, and reads what they need from the machine code.

A driver that names the wanted target makes Triton specialise and compile as a launch on that GPU would.
"""

from __future__ import annotations

import functools
import re
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
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
INSTRUCTION_BYTES = 16
SHF_EXECINSTR = 4  # of the flags of an ELF section
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
def compile_only(capability: int, left_out: Sequence[str] = ()) -> Iterator[list]:
    """Inside the block, launches compile for this capability (90: sm_90) and run nothing; yields the compiled kernels.

    Those whose names are left out are not compiled.
    """
    with launched_on(OfflineDriver(capability, device=capability), left_out) as compiled:
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
def launched_on(driver: OfflineDriver, left_out: Sequence[str] = ()) -> Iterator[list]:
    compiled = []
    run, active = (
        triton.JITFunction.run,
        triton.runtime.driver._active,
    )  # the public property would look for a GPU

    def compile_instead(self, *args, grid, warmup, **kwargs):
        # Triton's own choice of whether a product and a sum are rounded once changes with its version
        assert kwargs.get("enable_fp_fusion") is True, f"{self.fn.__name__}: fusion is left to Triton"
        if self.fn.__name__ not in left_out:
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
    """What a compiled kernel needs on its GPU."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    listing: Callable[[], list[str]]  # of all kernels that were asked for with this one
    lines: slice  # of the listing: this kernel's

    @functools.cached_property
    def instructions(self) -> str:
        return "\n".join(self.listing()[self.lines])

    @property
    def spill_instructions(self) -> int:
        """They go to the stack: where there is none, the second of disassembling is saved."""
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


def resources(compiled: Sequence, folder: Path) -> list[Resources]:
    """What kernels that were compiled for one capability need. They are disassembled together: the tool takes a second to start."""
    codes = [machine_code(kernel.asm["cubin"]) for kernel in compiled]

    @functools.cache
    def listing() -> list[str]:
        return disassembled(b"".join(codes), compiled[0].metadata.target.arch, folder)

    found, start = [], 0
    for kernel, code in zip(compiled, codes, strict=True):
        cubin, stop = folder / f"{kernel.hash}.cubin", start + len(code) // INSTRUCTION_BYTES
        cubin.write_bytes(kernel.asm["cubin"])
        usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", cubin))
        needs = {name: int(number) for name, number in usage}
        stack, shared = needs["STACK"] + needs["LOCAL"], kernel.metadata.shared
        found.append(Resources(kernel.name, needs["REG"], stack, shared, listing, slice(start, stop)))
        start = stop
    return found


def machine_code(cubin: bytes) -> bytes:
    """The sections of an ELF file that hold instructions."""
    (first,), (size, count) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    found = b""
    for header in range(first, first + size * count, size):
        flags, _, offset, length = struct.unpack_from("<4Q", cubin, header + 8)
        if flags & SHF_EXECINSTR:
            found += cubin[offset : offset + length]
    return found


def disassembled(code: bytes, capability: int, folder: Path) -> list[str]:
    """A line for each instruction."""
    file, architecture = folder / "code", f"SM{capability}{'a' if capability >= 90 else ''}"
    file.write_bytes(code)
    lines = re.findall(
        r"^ */\*[0-9a-f]+\*/.*", tool("nvdisasm", "--binary", architecture, file), re.MULTILINE
    )
    assert len(lines) == len(code) // INSTRUCTION_BYTES
    return lines


def tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout
