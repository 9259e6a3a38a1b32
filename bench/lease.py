"""What a first machine with a GPU is asked beside tests and benchmarks (bench/gpu.sh).

python -m bench.lease experts     bfloat16 experts on every backend against float64, twice, for the same bits
python -m bench.lease products    bandwidth, and the matrix products of the head with a result of 16 and of 32 bits
python -m bench.lease profiled    one call each of what a profiler is to look at
python -m bench.lease hopper      does the extension hold the kernels of this GPU

T tokens, H hidden, I intermediate size, E experts, K experts per token; N tokens, V vocabulary of a head.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import r1kernels
from r1kernels import backends, devices, extension

from .ceilings import best_of, copy_rate

SHAPE = {"T": 4096, "H": 512, "I": 256, "E": 8, "K": 2}
TINY = {"T": 64, "H": 32, "I": 16, "E": 4, "K": 2}
MOST = 1e-2  # of the largest exact value: the cap of bfloat16


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("experts", "products", "profiled", "hopper"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args()
    answers: dict[str, Callable[[torch.device], int]] = {
        "experts": experts,
        "products": products,
        "profiled": profiled,
        "hopper": hopper,
    }
    return answers[given.what](torch.device(given.device))


def experts(device: torch.device) -> int:
    """1 where a result or a gradient is further from float64 than bfloat16 may be, or its bits move."""
    arguments = _experts(device, SHAPE if device.type == "cuda" else TINY)
    exact = _both_ways(
        [each.double() if each.is_floating_point() else each for each in arguments], "reference"
    )
    failed = 0
    for name in backends.registered("moe_experts"):
        if name == "reference" or device.type != devices.SERVED[name][0]:
            continue
        first, second = (_both_ways(arguments, name) for _ in range(2))
        errors = [_error(*pair) for pair in zip(first, exact, strict=True)]
        same = all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        good = max(errors) <= MOST and same
        failed += not good
        words = ", ".join(f"{error:.1e}" for error in errors)
        print(
            f"{'ok' if good else 'FAILED'} experts {name}: errors {words}, {'same' if same else 'OTHER'} bits"
        )
    return 1 if failed else 0


def _experts(device: torch.device, shape: dict[str, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    t, h, i, e, k = (shape[name] for name in "THIEK")

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, torch.bfloat16)

    scores, indices = torch.randn(t, e, generator=generator).topk(k)
    weights = scores.softmax(-1).to(device)
    return [
        normal(t, h),
        indices.to(device),
        weights,
        normal(e, 2 * i, h) * h**-0.5,
        normal(e, h, i) * i**-0.5,
    ]


def _both_ways(arguments: list[Tensor], backend: str) -> list[Tensor]:
    leaves = [
        each.detach().clone().requires_grad_() if each.is_floating_point() else each for each in arguments
    ]
    out = r1kernels.moe_experts(*leaves, backend=backend)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def products(device: torch.device) -> int:
    """Prints bytes a second of a copy, and FLOPs a second of the head's product by the dtype of its result."""
    cuda = device.type == "cuda"
    n, v, h = (8192, 32768, 4096) if cuda else (64, 256, 64)
    hidden, weight = (torch.randn(size, h, device=device).bfloat16() for size in (n, v))
    kinds: dict[str, Callable[[], object]] = {"bfloat16": lambda: hidden @ weight.t()}
    if cuda:
        kinds["float32"] = lambda: torch.mm(hidden, weight.t(), torch.float32)
    for name, product in kinds.items():
        print(
            f"product N {n}, V {v}, H {h} to {name}: {2e-12 * n * v * h / best_of(device, 10, product):.0f} TFLOP/s"
        )
    print(f"copy: {1e-12 * copy_rate(device, 5):.2f} TB/s")
    return 0


def profiled(device: torch.device) -> int:
    shape = {"T": 8192, "H": 2048, "I": 768, "E": 128, "K": 8} if device.type == "cuda" else TINY
    _both_ways(_experts(device, shape), "cuda" if device.type == "cuda" else "cpu")
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


if __name__ == "__main__":
    sys.exit(main())
