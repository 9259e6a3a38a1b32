"""Builds the extension r1kernels._C with CMake and Ninja against the torch that is installed.

What it takes from the environment:
    R1KERNELS_NO_EXTENSION=1    install the Python part alone (every op then runs on its reference or on Triton)
    R1KERNELS_CUDA=AUTO|ON|OFF  CUDA kernels: if an nvcc is found (default), or fail without one, or never
    R1KERNELS_CUDA_ARCHITECTURES="90 100"  for these alone; default: all from sm_80 on that nvcc knows. 90 means 90a too
    R1KERNELS_TORCH_DIR         the folder of the torch package, if it is not where Python's packages lie
    R1KERNELS_CUTLASS_DIR       the include folder of CUTLASS; an installed nvidia-cutlass is found without it
    CXX, CUDACXX, CUDA_HOME     compilers, as everywhere
    MAX_JOBS                    compilations at a time
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MEMORY_PER_JOB = 2 << 30  # bytes; the largest translation unit here needs less


def environment_flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def package_dir(name: str, marker: str) -> Path | None:
    """The folder of an installed package that holds the file `marker`, found without importing the package.

    In pip's isolated environment the package itself is not importable, but sysconfig still names the real one.
    """
    spec = importlib.util.find_spec(name)
    found = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found += [Path(sysconfig.get_path(kind)) / name for kind in ("purelib", "platlib")]
    return next((folder for folder in found if (folder / marker).is_file()), None)


def torch_dir() -> Path:
    marker = "include/torch/csrc/stable/library.h"
    given = os.environ.get("R1KERNELS_TORCH_DIR")
    if given:
        folder = Path(given).resolve()
        if not (folder / marker).is_file():
            raise SystemExit(
                f"R1KERNELS_TORCH_DIR: expected the folder of torch >= 2.10, {folder} has no {marker}"
            )
        return folder
    folder = package_dir("torch", marker)
    if folder is None:
        raise SystemExit(
            "r1kernels is built against the installed torch, and none >= 2.10 was found. Install torch first, or name "
            "its folder in R1KERNELS_TORCH_DIR, or set R1KERNELS_NO_EXTENSION=1 for the Python part alone."
        )
    return folder


def torch_version(folder: Path) -> str:
    found = re.search(r"^__version__ = ['\"]([^'\"]+)", (folder / "version.py").read_text(), re.MULTILINE)
    return found.group(1) if found else "unknown"


def cutlass_dir() -> str:
    given = os.environ.get("R1KERNELS_CUTLASS_DIR")
    if given:
        if not Path(given, "cute/tensor.hpp").is_file():
            raise SystemExit(
                f"R1KERNELS_CUTLASS_DIR: expected CUTLASS's include folder, {given} has no cute/tensor.hpp"
            )
        return str(Path(given).resolve())
    folder = package_dir("cutlass_library", "source/include/cute/tensor.hpp")
    return str(folder / "source" / "include") if folder else ""


def cuda() -> str:
    given = os.environ.get("R1KERNELS_CUDA", "AUTO")
    if given.upper() not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"R1KERNELS_CUDA: expected AUTO, ON or OFF, got {given!r}")
    return given.upper()


def cuda_architectures() -> str:
    given = os.environ.get("R1KERNELS_CUDA_ARCHITECTURES", "").split()
    if any(not name.isdigit() or int(name) < 80 for name in given):
        raise SystemExit(
            f"R1KERNELS_CUDA_ARCHITECTURES: expected numbers from 80 on, such as '90', got {' '.join(given)!r}"
        )
    return ";".join(sorted(given, key=int))


def jobs() -> int:
    given = os.environ.get("MAX_JOBS", "")
    if given:
        if not given.isdigit() or int(given) == 0:
            raise SystemExit(f"MAX_JOBS: expected a whole number above 0, got {given!r}")
        return int(given)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // MEMORY_PER_JOB))


def program(name: str) -> str:
    """cmake or ninja: from the environment that builds (PyPI's packages put it on PATH), else the system's."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise SystemExit(f"r1kernels needs {name} to build: pip install {name}")
    return found


def have_compiler() -> bool:
    given = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (given[:1] or ["c++", "g++", "clang++"]))


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt in a folder that stays, so that a second build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        import pybind11

        torch = torch_dir()
        ninja = program("ninja")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "R1KERNELS_TORCH_DIR": torch,
            "R1KERNELS_TORCH_VERSION": torch_version(torch),
            "R1KERNELS_CUDA": cuda(),
            "R1KERNELS_CUDA_ONLY": cuda_architectures(),
            "R1KERNELS_CUTLASS_DIR": cutlass_dir(),
            "R1KERNELS_OUTPUT_DIR": target.parent,
            "R1KERNELS_OUTPUT_NAME": target.name,
        }
        cmake, parallel = program("cmake"), str(jobs())
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", parallel], check=True)


def extensions() -> list[Extension]:
    if environment_flag("R1KERNELS_NO_EXTENSION"):
        return []
    if not have_compiler():
        print("r1kernels: no C++ compiler was found, the Python part alone is installed", file=sys.stderr)
        return []
    return [Extension("r1kernels._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
