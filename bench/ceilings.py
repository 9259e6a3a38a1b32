"""The three ceilings of the machine, measured in the same run as everything else: bytes, FLOPs and exponentials per second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

import r1kernels

from .ops.cases import DTYPES, Case, Work
from .timing import repeated

BOUNDS = ("bandwidth", "GEMM", "exp")
# a product that takes longer is not measured: the rate of a small one does
_LONG_SECONDS = 4.0


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_second: read plus written by a large copy. flops_per_second: a large GEMM, by dtype.

    exps_per_second: in float32 over values that stay in the cache, by torch.exp or by the forward of token_logprobs
    over as many logits, whichever is faster: a floor must not lie above what can be reached.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]
    exps_per_second: float

    def floor(self, work: Work, dtype: str) -> tuple[float, str]:
        """The least seconds that the work takes, and which ceiling says so."""
        # 16 bits can be widened
        products = max(self.flops_per_second[name] for name in (dtype, "float32"))
        seconds = {
            "bandwidth": work.bytes / self.bytes_per_second,
            "GEMM": work.flops / products,
            "exp": work.exps / self.exps_per_second,
        }
        bound = max(BOUNDS, key=seconds.__getitem__)
        return seconds[bound], bound

    def of_torch(self, case: Case) -> float:
        """Seconds of the products of a forward and its backward as torch multiplies in the dtype of the case."""
        return case.work().get("forward+backward", Work()).flops / self.flops_per_second[case.dtype]

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of both, one by one: of two runs on one machine the quieter moment is nearer to what it can do."""
        flops = {
            name: max(value, other.flops_per_second[name]) for name, value in self.flops_per_second.items()
        }
        both = ((one.bytes_per_second, one.exps_per_second) for one in (self, other))
        copied, exps = map(max, *both)
        return Ceilings(copied, flops, exps)

    def floors(self, case: Case) -> dict[str, tuple[float, str]]:
        """Phase -> (seconds, bound); forward+backward is the sum, bound by the larger part; nothing of a whole step."""
        found = {phase: self.floor(work, case.dtype) for phase, work in case.work().items()}
        if found:
            forward, backward = found["forward"], found["backward"]
            found["forward+backward"] = (forward[0] + backward[0], max(forward, backward)[1])
        return found


def measure(device: torch.device, rounds: int = 5) -> Ceilings:
    """The best of a few rounds of each."""
    flops = {name: _gemm_rate(device, dtype, rounds) for name, dtype in DTYPES.items()}
    return Ceilings(copy_rate(device, rounds), flops, _exps(device, rounds))


def _gemm_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """FLOPs a second of a large product; of a small one where torch has nothing but a loop for the dtype on this processor."""
    large, rate = 8192 if device.type == "cuda" else 2048, 0.0
    for size in (256, large):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rate = 2 * size**3 / min(repeated(partial(torch.matmul, left, right), device, rounds))
        if 2 * large**3 / rate > _LONG_SECONDS:
            break
    return rate


def _exps(device: torch.device, rounds: int) -> float:
    """Exponentials a second over half a megabyte a thread, in its own cache, and over as much as the last cache holds."""
    found = []
    for rows in (256,) if device.type == "cuda" else (4 * torch.get_num_threads(), 64):
        cached = torch.randn(rows, 32768, device=device)
        targets = torch.zeros(rows, dtype=torch.int64, device=device)
        exp = partial(torch.exp, cached, out=torch.empty_like(cached))
        for function in (exp, partial(r1kernels.token_logprobs, cached, targets)):
            seconds = min(repeated(function, device, rounds, calls=30))
            found.append(30 * cached.numel() / seconds)
    return max(found)


def copy_rate(device: torch.device, rounds: int) -> float:
    """Bytes a second, read plus written, of a copy far larger than the caches."""
    source = torch.ones(1 << 30 if device.type == "cuda" else 1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(repeated(lambda: target.copy_(source), device, rounds))
