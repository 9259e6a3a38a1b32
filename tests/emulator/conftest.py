"""Builds the CUDA sources for the host emulator, once for each state of the sources."""

import fcntl
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import which
from types import ModuleType

import nanobind
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
EMULATED = ["-Og", "-fsanitize=alignment"]  # at -O1 a build takes longer by more than the tests save


@pytest.fixture(scope="session")
def emulated(request, tmp_path_factory):
    """emulated("name"): the module that tests/emulator/name.cpp defines, compiled with the emulator."""
    compiler = which("g++") or which("clang++")
    if compiler is None:
        pytest.skip("the host emulator needs a C++ compiler")
    cache = getattr(request.config, "cache", None)  # none where its plugin is off
    builds = cache.mkdir("emulator") if cache else tmp_path_factory.mktemp("emulator")
    folder = builds / state_of_sources(compiler)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in set(builds.iterdir()) - {folder}:
        shutil.rmtree(stale, ignore_errors=True)
    return functools.cache(lambda name: load(name, build(compiler, name, folder)))


def state_of_sources(compiler: str) -> str:
    """A name for what the modules are compiled from, and with what."""
    sources = [path for suffix in ("*.cpp", "*.h", "*.cu*") for path in HERE.rglob(suffix)]
    sources += [path for suffix in ("*.h", "*.cu*") for path in CSRC.rglob(suffix)]
    settings = [compiler, *FLAGS, *EMULATED, nanobind.__version__, sys.version]
    state = hashlib.sha256(" ".join(settings).encode())
    for path in sorted(sources):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


def build(compiler: str, name: str, folder: Path) -> Path:
    """The library of a module."""
    # nanobind, for pybind11's templates take longer to compile than the kernels
    source, headers = Path(nanobind.source_dir()), [HERE / "include", CSRC, nanobind.include_dir()]
    headers += [source.parent / "ext/robin_map/include", sysconfig.get_path("include")]
    command = [compiler, *FLAGS, *(f"-I{path}" for path in headers)]
    binding = made(folder / "nanobind.o", [*command, "-c", source / "nb_combined.cpp"])
    emulator = made(folder / "emulator.o", [*command, "-O2", "-c", HERE / "emulator.cpp"])
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return made(library, [*command, *EMULATED, "-shared", HERE / f"{name}.cpp", emulator, binding])


def made(file: Path, command: list[str | Path]) -> Path:
    """The file, which the first process that asks for it lets the command write; the others wait."""
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            unfinished = file.with_name(f"unfinished-{file.name}")
            subprocess.run([*command, "-o", unfinished], check=True)
            unfinished.replace(file)
    return file


def load(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
