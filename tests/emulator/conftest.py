"""Builds the CUDA sources for the host emulator, once for each state of the sources."""

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from shutil import which
from types import ModuleType

import pybind11
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-fsanitize=alignment",
]


@pytest.fixture(scope="session")
def emulated(request):
    """emulated("name"): the pybind11 module that tests/emulator/name.cpp defines, compiled with the emulator."""
    compiler = which("g++") or which("clang++")
    if compiler is None:
        pytest.skip("the host emulator needs a C++ compiler")
    folder = request.config.cache.mkdir("emulator")
    modules: dict[str, ModuleType] = {}

    def module(name: str) -> ModuleType:
        if name not in modules:
            modules[name] = load(name, build(compiler, name, folder))
        return modules[name]

    return module


def build(compiler: str, name: str, folder: Path) -> Path:
    sources = sorted(
        [
            *HERE.rglob("*.cpp"),
            *HERE.rglob("*.h"),
            *HERE.rglob("*.cu*"),
            *CSRC.rglob("*.cu*"),
            *CSRC.rglob("*.h"),
        ]
    )
    state = hashlib.sha256(" ".join([compiler, *FLAGS, pybind11.__version__]).encode())
    for path in sources:
        state.update(path.name.encode() + path.read_bytes())
    library = folder / f"{name}-{state.hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        includes = [HERE / "include", CSRC, pybind11.get_include(), sysconfig.get_path("include")]
        command = [compiler, *FLAGS, *(f"-I{path}" for path in includes), "-o", str(unfinished)]
        subprocess.run([*command, str(HERE / f"{name}.cpp"), str(HERE / "emulator.cpp")], check=True)
        unfinished.replace(library)
        for stale in folder.glob(f"{name}-*"):
            if stale.suffix == library.suffix and stale != library:
                stale.unlink(missing_ok=True)
    return library


def load(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
