"""What the Hopper kernels of the grouped products become for sm_90a, as far as it shows without such a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# element types times: the up projection and the backward of the gate, each for both activations, and plain products of both
# layouts of the weight
ROW_KERNELS = 2 * (2 * 2 + 2)
WEIGHT_KERNELS = 2 * 3  # rows gathered left, right, not at all


@pytest.fixture(scope="module")
def compile_for_hopper(tmp_path_factory):
    """compile_for_hopper(source, name, option, ...): the file that nvcc made, and what it said."""
    toolkits = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(toolkit, "bin")) for toolkit in toolkits if toolkit]
    name = os.environ.get("CUDACXX") or "nvcc"
    nvcc = shutil.which(name, path=os.pathsep.join([*places, os.environ["PATH"]]))
    if not nvcc:
        pytest.skip("no nvcc was found")
    cutlass = os.environ.get("R1KERNELS_CUTLASS_DIR")
    if not cutlass:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("the headers of CUTLASS are missing: make cutlass installs them")
        cutlass = str(Path(spec.submodule_search_locations[0], "source", "include"))
    folder = tmp_path_factory.mktemp("hopper")

    def run(source, name, *options):
        target = [nvcc, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a"]
        places = ["-I", str(ROOT / "csrc"), "-isystem", cutlass, "-o", str(folder / name), str(source)]
        result = subprocess.run([*target, *options, *places], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return folder / name, result.stdout + result.stderr

    return run


def test_operands_lie_in_shared_memory_where_wgmma_looks_for_them(compile_for_hopper):
    program, _ = compile_for_hopper(ROOT / "tests/packaging/hopper_layouts.cu", "layouts", "-O1")
    counts = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert counts.split() == ["0"] * 8


@pytest.mark.parametrize(("family", "count"), [("rows", ROW_KERNELS), ("weights", WEIGHT_KERNELS)])
def test_kernels_multiply_by_wgmma_and_keep_everything_in_registers(compile_for_hopper, family, count):
    triton = pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")
    source = ROOT / f"csrc/moe/cuda_sm90a_{family}.cu"
    binary, said = compile_for_hopper(source, family, "-O3", "-DNDEBUG", "-cubin", "-Xptxas", "-v")
    # C7508: setmaxnreg was ignored; C7510, C7514, ...: wgmma waits after every instruction
    assert not re.search(r"\(C75\d\d\)|warning", said), said
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == count

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == count
    for kernel in kernels:
        name = kernel.splitlines()[0]
        assert re.search(r"HGMMA\.64x256x16\.F32", kernel), name
        assert "HMMA" not in kernel.replace("HGMMA", ""), name
        assert "UTMALDG.3D" in kernel, name
        assert len(re.findall("USETMAXREG", kernel)) == 2, name
        assert "STG.E.128" in kernel and not re.search(r"\b(LDL|STL)\b", kernel), name
        # no conversion of one element, no slow path of a division or an exponential
        assert not re.search(r"\bF2F\.|\bCALL\b", kernel), name
        # where the next tile lies is asked for before this one is written
        of_consumers = re.findall(r"\b(HGMMA|LDG|STG)\b", kernel[: kernel.rindex("USETMAXREG")])
        written = of_consumers.index("STG")
        assert "HGMMA" not in of_consumers[written:] and of_consumers[written - 1] == "LDG", name
        plain_product = "Epilogue0E" in name
        assert ("LDGSTS.E.BYPASS.128" in kernel) is not plain_product, name
