"""What the kernels become for sm_90, read from their machine code: bench/results/machine_code.json, and what writes it again.

python -m tests.support.machine_code [SOURCE ...]      of these alone, such as csrc/moe/cuda_sm80_route.cu or triton

Every CUDA kernel, for sm_90 or sm_90a, and of Triton's ("triton") the tiles of many rows in bfloat16, and ("triton-others") the
router, the order of experts, GRPO, kept sets and divergences, at one call of each. "products": wgmma instructions;
"serialised": those behind which the next one waits for the end; "epilogue": instructions behind the last product, a
consumer's where producers have code of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import results

ROOT = Path(__file__).parents[2]
FILE = ROOT / "bench/results/machine_code.json"
CAPABILITY = 90


def nvcc() -> str | None:
    """The compiler, that of the toolkit rather than one on PATH."""
    toolkits = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(toolkit, "bin")) for toolkit in toolkits if toolkit]
    return shutil.which(
        os.environ.get("CUDACXX") or "nvcc", path=os.pathsep.join([*places, os.environ["PATH"]])
    )


def cutlass() -> str | None:
    """The include folder of CUTLASS."""
    import importlib.util

    if os.environ.get("R1KERNELS_CUTLASS_DIR"):
        return os.environ["R1KERNELS_CUTLASS_DIR"]
    spec = importlib.util.find_spec("cutlass_library")
    places = spec.submodule_search_locations if spec else None
    return str(Path(places[0], "source", "include")) if places else None


def toolchain() -> dict[str, str]:
    """Versions: with others the machine code may differ."""
    import triton

    compiler = nvcc()
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else ""
    found = re.search(r"V([\d.]+)", said)
    return {"nvcc": found.group(1) if found else "", "triton": triton.__version__}


def sources() -> list[str]:
    """What kernels are compiled from: the .cu files, and what Triton compiles."""
    found = sorted((ROOT / "csrc").glob("*/cuda_sm*.cu"))
    return [*(str(path.relative_to(ROOT)) for path in found), *TRITON]


def kernels(source: str) -> dict[str, dict[str, Any]]:
    """Name -> what it needs and holds, of every kernel of a source."""
    with tempfile.TemporaryDirectory() as folder:
        if source in TRITON:
            return needs_of(TRITON[source](), Path(folder))
        return of_cuda(ROOT / source, Path(folder))


def of_cuda(source: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The kernels of one .cu file."""
    hopper = source.name.startswith("cuda_sm90a")
    architecture = f"{CAPABILITY}a" if hopper else str(CAPABILITY)
    cubin = folder / f"{source.stem}.cubin"
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-O3", "-DNDEBUG", "-cubin"]
    places = ["-I", str(ROOT / "csrc"), *(["-isystem", str(cutlass())] if hopper else [])]
    subprocess.run([str(nvcc()), "-std=c++17", *target, *places, "-o", cubin, source], check=True)
    from .offline_triton import tool

    usage = dict(re.findall(r"Function (\S+):\s*(REG:.*)", tool("cuobjdump", "-res-usage", cubin)))
    found = {}
    for code in tool("cuobjdump", "-sass", cubin).split("Function : ")[1:]:
        name = code.splitlines()[0].strip()
        needs = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[name])}
        found[plain(name)] = {
            "registers": needs["REG"],
            "stack_bytes": needs["STACK"],
            "shared_bytes": needs["SHARED"],
            **counts(code),
        }
    return found


def of_products() -> list[Any]:
    """The kernels with products that a forward and a backward of experts and of the head launch, and those of the rows."""
    from r1kernels.moe import tuning
    from tests.triton import test_linear_logprobs_ahead_of_time as head
    from tests.triton import test_moe_experts_ahead_of_time as experts
    from tests.triton import test_token_logprobs_ahead_of_time as rows

    from . import offline_triton

    def tile(kernel: str, device: torch.device, dtype: torch.dtype, rows: int, experts: int) -> tuning.Tile:
        return tuning.choose(kernel, "", divmod(CAPABILITY, 10), dtype, -(-rows // experts))

    chosen, tuning.tile = tuning.tile, tile
    try:
        with offline_triton.compile_only(CAPABILITY) as compiled:
            experts.forward(4096 * experts.EXPERTS, torch.bfloat16, 256)
            experts.backward(4096 * experts.EXPERTS, torch.bfloat16, 256)
            logits, row = torch.empty(2, 3, 4096, dtype=torch.bfloat16), torch.zeros(6)
            rows.forward(logits, rows.rows_of(4096), True, False)
            rows.backward(logits, rows.rows_of(4096), row, row)
            head.launch(CAPABILITY, "plain", None)
    finally:
        tuning.tile = chosen
    return compiled


def of_others() -> list[Any]:
    """The kernels without large products."""
    from r1kernels.moe import triton_sort
    from tests.triton import test_grpo_ahead_of_time as grpo
    from tests.triton import test_kept_products_ahead_of_time as kept
    from tests.triton import test_linear_divergence_ahead_of_time as divergence
    from tests.triton import test_moe_route_ahead_of_time as router

    from . import offline_triton

    with offline_triton.compile_only(CAPABILITY) as compiled:
        for one in router.ROUTERS[:3]:
            router.launch(*one)
        for rows in (300, 5000):
            triton_sort.sort_rows(torch.zeros(rows, dtype=torch.int64), 256, torch.int64)
        grpo.launch(*grpo.CALLS[0])
        kept.launch(torch.bfloat16, 896)
        divergence.launch(4096, 0)
    return list(compiled)


TRITON = {"triton": of_products, "triton-others": of_others}


def needs_of(compiled: list[Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> what each of Triton's compiled kernels needs."""
    from . import offline_triton

    found: dict[str, dict[str, Any]] = {}
    for needs in offline_triton.resources(compiled, folder):
        name = needs.name
        while name in found:  # another use of one kernel
            name += "'"
        found[name] = {
            "registers": needs.registers,
            "stack_bytes": needs.stack_bytes,
            "shared_bytes": needs.shared_bytes,
            **counts(needs.instructions),
        }
    return found


def counts(code: str) -> dict[str, int]:
    """Instructions of a disassembled kernel."""
    from .offline_triton import serialised

    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    products = [place for place, name in enumerate(instructions) if name.startswith("HGMMA")]
    epilogue = []
    if products:
        epilogue = instructions[products[-1] + 1 :]
        ends = [place for place, name in enumerate(epilogue) if name.startswith("USETMAXREG")]
        epilogue = epilogue[: ends[0]] if ends else epilogue
    return {
        "instructions": len(instructions),
        "products": len(products),
        "serialised": serialised(code),
        "epilogue": len(epilogue),
    }


def plain(mangled: str) -> str:
    """A kernel's name as C++ has it, without its arguments and namespaces."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"r1kernels::|moe::|hopper::|logprob::|grpo::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r">\(.*|(?<=kernel)\(.*", lambda found: ">" if found.group().startswith(">") else "", name)


def main(wanted: list[str]) -> None:
    record = {"toolchain": toolchain(), "architecture": f"sm_{CAPABILITY}", "kernels": {}}
    if wanted:
        record = json.loads(FILE.read_text())
    record["kernels"] |= {source: kernels(source) for source in wanted or sources()}
    record["kernels"] = {source: record["kernels"][source] for source in sources()}
    results.save(FILE, record)
    print(f"{FILE.relative_to(ROOT)}: {sum(map(len, record['kernels'].values()))} kernels", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
