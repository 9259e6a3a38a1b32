"""pip install in environments of their own: with and without build isolation, extension and compiler; from the sdist.

The environments see the torch of this one (and its dependencies), but not this r1kernels.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

from tests.support import fresh

ROOT = Path(__file__).parents[2]
HERE = Path(sysconfig.get_path("purelib"))

CHECK = """
import site, sys, torch
site.addsitedir(sys.path[0])  # reads the .pth file of an editable install
import r1kernels
from r1kernels import extension
print(r1kernels.__file__)
print(extension.missing())
backend = "reference" if extension.missing() else "cpu"
logp = r1kernels.token_logprobs(torch.zeros(1, 4), torch.tensor([1]), backend=backend)
print(f"{logp.item():.4f}")
"""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")


@pytest.fixture
def environment(tmp_path):
    """The interpreter of a new virtual environment that finds this one's packages, torch as if installed there."""
    folder = tmp_path / "environment"
    venv.create(folder)  # its pip is this one's too
    python = folder / "bin" / "python"
    packages = packages_of(python)
    (packages / "torch").symlink_to(Path(torch.__file__).parent)
    # one line that is a path: the .pth files over there, an editable r1kernels among them, are not read
    (packages / "dependencies.pth").write_text(f"{HERE}\n")
    return python


def packages_of(python):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return python.parents[1] / "lib" / version / "site-packages"


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT]
    # the files are gathered in the checkout, where two processes would meet
    with open(ROOT / "setup.py") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (archive,) = folder.glob("r1kernels-*.tar.gz")
    return archive


@pytest.fixture
def source(sdist, tmp_path):
    """The unpacked sdist: what is built there leaves no trace in the checkout."""
    # not by tarfile with a filter, which Python has from 3.11.4 on
    shutil.unpack_archive(sdist, tmp_path)
    return tmp_path / sdist.name.removesuffix(".tar.gz")


def pip_install(python, *arguments, **variables):
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--force-reinstall", "-v", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def installed(result, python):
    """(path, missing) as the installed package answers from a folder that is not a checkout."""
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    answer = fresh.run(CHECK, path=packages_of(python))
    assert answer.returncode == 0, answer.stderr
    path, missing, value = answer.stdout.splitlines()
    assert value == "-1.3863"  # -log 4
    return Path(path), missing


def test_the_sdist_holds_what_a_build_needs_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"setup.py", "CMakeLists.txt", "LICENSE", "README.md", "cmake/cuda.cmake", "csrc/bindings.cpp"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "r1kernels").rglob("*.py")}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith("build/")]
    assert not [name for name in names if name.startswith(("training/", "bench/"))]


def test_a_python_only_install(environment, source):
    result = pip_install(environment, "--no-build-isolation", source, R1KERNELS_NO_EXTENSION="1")
    path, missing = installed(result, environment)
    assert path.is_relative_to(environment.parents[1])
    assert "installed without a C++ compiler or with R1KERNELS_NO_EXTENSION=1" in missing
    assert not list(path.parent.glob("*.so"))
    assert {folder.name for folder in path.parents[1].iterdir()} >= {"r1kernels"}
    assert not (path.parents[1] / "training").exists() and not (path.parents[1] / "csrc").exists()


def setup(source, command, **variables):
    environment = {**os.environ, **variables}
    arguments = [sys.executable, "setup.py", command]
    return subprocess.run(arguments, cwd=source, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_python_part_alone_is_built(source):
    result = setup(source, "build", CXX="/no/such/compiler")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler was found, the Python part alone is installed" in result.stderr
    assert list(source.glob("build/lib*/r1kernels/__init__.py")) and not list(source.rglob("*.so"))


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"R1KERNELS_TORCH_DIR": "/no/such/torch"},
            "R1KERNELS_TORCH_DIR: expected the folder of torch >= 2.10",
        ),
        ({"R1KERNELS_CUTLASS_DIR": "/no/such"}, "R1KERNELS_CUTLASS_DIR: expected CUTLASS's include folder"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: expected a whole number above 0, got 'many'"),
        ({"R1KERNELS_CUDA": "perhaps"}, "R1KERNELS_CUDA: expected AUTO, ON or OFF, got 'perhaps'"),
        (
            {"R1KERNELS_CUDA_ARCHITECTURES": "90 hopper"},
            "R1KERNELS_CUDA_ARCHITECTURES: expected numbers from 80 on, such as '90', got '90 hopper'",
        ),
    ],
)
def test_bad_settings_of_a_build_are_one_clear_line(source, variables, text):
    result = setup(source, "build_ext", **variables)
    assert result.returncode != 0
    assert text in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_sdist_builds_without_isolation(environment, sdist, tmp_path):
    result = pip_install(environment, "--no-build-isolation", sdist, R1KERNELS_CUDA="OFF")
    path, missing = installed(result, environment)
    assert missing == "None" and path.is_relative_to(environment.parents[1])
    text = subprocess.run(
        [environment, "-m", "r1kernels"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "no nvcc was found, or R1KERNELS_CUDA=OFF" in text


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["copied", "editable"])
def test_an_isolated_build_finds_the_torch_that_is_installed(environment, source, editable):
    result = pip_install(environment, *(["-e"] if editable else []), source, R1KERNELS_CUDA="OFF")
    if "No matching distribution found for" in result.stdout + result.stderr:
        pytest.skip("no package index here that has the build's requirements")
    path, missing = installed(result, environment)
    assert missing == "None"
    assert path.is_relative_to(source if editable else environment.parents[1])


@pytest.mark.slow
def test_a_second_build_compiles_nothing_again(environment, source):
    for expected in (True, False):
        result = pip_install(environment, "--no-build-isolation", source, R1KERNELS_CUDA="OFF")
        assert result.returncode == 0
        assert ("Building CXX object" in result.stdout + result.stderr) is expected


def test_cuda_asked_for_without_an_nvcc_is_an_error(source):
    result = setup(source, "build_ext", R1KERNELS_CUDA="ON", CUDACXX="/no/such/nvcc")
    assert result.returncode != 0 and "R1KERNELS_CUDA=ON, and no nvcc was found" in result.stderr
