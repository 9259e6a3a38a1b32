"""What a first machine with a GPU is asked beside tests and benchmarks (bench/gpu.sh).

experts: bfloat16 experts on every backend against float64, twice, for the same bits. products: bandwidth, and the matrix products
of the head with a result of 16 and of 32 bits. profiled: one call each of what a profiler is to look at. hopper: does the extension
hold the kernels of this GPU.

T tokens, H hidden, I intermediate size, E experts, K experts per token; N tokens, V vocabulary of a head.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import r1kernels
from r1kernels import backends, devices, extension

from .. import timing
from ..ceilings import copy_rate
from ..ops.cases import Case
from ..ops.families import OPS
from ..ops.numerics import CAP
from ..ops.peers import Inputs

SHAPE = {"T": 4096, "H": 512, "I": 256, "E": 8, "K": 2}
LARGE = {"T": 8192, "H": 2048, "I": 768, "E": 128, "K": 8}
TINY = {"T": 64, "H": 32, "I": 16, "E": 4, "K": 2}


def main(
    what: Literal["experts", "products", "profiled", "hopper"], device: Literal["cpu", "cuda"] = "cuda"
) -> int:
    answers = {"experts": experts, "products": products, "profiled": profiled, "hopper": hopper}
    return answers[what](torch.device(device))


def _experts(device: torch.device, shape: dict[str, int]) -> Case:
    return Case("moe_experts", device.type, "bfloat16", shape if device.type == "cuda" else TINY)


def _both_ways(case: Case, inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    out = OPS["moe_experts"].ours.peer(**options).make(case, inputs)(inputs)["out"]
    return {"out": out.detach(), **inputs.gradients({"out": out})}


def experts(device: torch.device) -> int:
    """1 where a result or a gradient is further from float64 than bfloat16 may be, or its bits move."""
    case, op = _experts(device, SHAPE), OPS["moe_experts"]
    inputs, exact = op.problem(case, device)
    failed = 0
    for name in backends.registered("moe_experts"):
        if name == "reference" or device.type != devices.SERVED[name][0]:
            continue
        first, second = (_both_ways(case, inputs, backend=name) for _ in range(2))
        errors = op.errors(first, exact).values()
        same = all(torch.equal(first[result], second[result]) for result in first)
        good = max(errors) <= CAP[torch.bfloat16] and same
        failed += not good
        words = f"errors {', '.join(f'{one:.1e}' for one in errors)}, {'same' if same else 'OTHER'} bits"
        print(f"{'ok' if good else 'FAILED'} experts {name}: {words}")
    return int(failed > 0)


def products(device: torch.device) -> int:
    """Prints bytes a second of a copy, and FLOPs a second of the head's product by the dtype of its result."""
    cuda = device.type == "cuda"
    n, v, h = (8192, 32768, 4096) if cuda else (64, 256, 64)
    hidden, weight = (torch.randn(size, h, device=device).bfloat16() for size in (n, v))
    kinds: dict[str, Callable[[], object]] = {"bfloat16": lambda: hidden @ weight.t()}
    if cuda:
        kinds["float32"] = lambda: torch.mm(hidden, weight.t(), torch.float32)
    for name, product in kinds.items():
        rate = 2e-12 * n * v * h / min(timing.repeated(product, device, 10))
        print(f"product N {n}, V {v}, H {h} to {name}: {rate:.0f} TFLOP/s")
    print(f"copy: {1e-12 * copy_rate(device, 5):.2f} TB/s")
    return 0


def profiled(device: torch.device) -> int:
    case = _experts(device, LARGE)
    inputs = OPS["moe_experts"].inputs(case, device).require_grad()
    _both_ways(case, inputs, backend=device.type)
    n, v = (4096, 151936) if device.type == "cuda" else (8, 64)
    logits = torch.randn(n, v, device=device, dtype=torch.bfloat16)
    r1kernels.token_logprobs(logits, torch.zeros(n, dtype=torch.int64, device=device), return_entropy=True)
    return 0


def hopper(device: torch.device) -> int:
    """1 on a Hopper GPU without the wgmma kernels."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    built = extension.cuda_architectures()
    print(f"capability {major}, built for {', '.join(built) or 'no GPU'}")
    if major == 9 and "90a" not in built:
        print("FAILED: no sm_90a: give the wheel of nvidia-cutlass by --wheels, or R1KERNELS_CUTLASS_DIR")
        return 1
    return 0
