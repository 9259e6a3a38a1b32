"""The marks: what the kernels for GPUs are to reach, each at the shape of one case.

A mark is a time that follows from the ceilings of the machine, or a fixed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cases import CASES, Case
from .ceilings import Ceilings


def _case(op: str, layout: str = "", **sizes: int) -> Case:
    (found,) = (
        case
        for case in CASES
        if case.device == "cuda" and case.op == op and dict(case.sizes) == sizes and case.layout == layout
    )
    return found


@dataclass(frozen=True)
class Mark:
    """The phase of a case, the mark in words, and its seconds under the ceilings of a machine."""

    case: Case
    phase: str
    words: str
    seconds: Callable[[Case, Ceilings], float]

    def goal(self, ceilings: Ceilings) -> float:
        return self.seconds(self.case, ceilings)


def flops(case: Case, phase: str) -> float:
    """Of a phase, or of both where it is "forward+backward"."""
    work = case.work()
    return sum(work[part].flops for part in phase.split("+"))


def at_rate(phase: str, rate: float) -> Callable[[Case, Ceilings], float]:
    return lambda case, ceilings: flops(case, phase) / rate


def of_bandwidth(share: float) -> Callable[[Case, Ceilings], float]:
    return lambda case, ceilings: case.work()["forward"].bytes / ceilings.bytes_per_second / share


def of_eight_products(share: float) -> Callable[[Case, Ceilings], float]:
    """share * 8 N V H at the rate of a GEMM: the logits forward, again in the backward, and two gradients."""

    def seconds(case: Case, ceilings: Ceilings) -> float:
        products = 4 * case.work()["forward"].flops
        return share * products / ceilings.flops_per_second[case.dtype]

    return seconds


def at_most(seconds: float) -> Callable[[Case, Ceilings], float]:
    return lambda case, ceilings: seconds


HEAD = _case("linear_logprobs", N=8192, V=131072, H=4096)
LARGE_HEAD = _case("linear_logprobs", N=16384, V=248320, H=2048)
EXPERTS = _case("moe_experts", T=32768, H=2048, I=768, E=128, K=8)
BOTH = "forward+backward"
MARKS = (
    Mark(_case("token_logprobs", N=8192, V=151936), "forward", "85 % of the bandwidth", of_bandwidth(0.85)),
    Mark(HEAD, "forward", "650 TFLOP/s", at_rate("forward", 650e12)),
    Mark(HEAD, BOTH, "1.10 of 8 N V H", of_eight_products(1.10)),
    Mark(LARGE_HEAD, BOTH, "1.10 of 8 N V H", of_eight_products(1.10)),
    Mark(_case("grpo_loss", "padded", B=64, L=1024), "forward", "20 microseconds", at_most(20e-6)),
    Mark(EXPERTS, "forward", "550 TFLOP/s", at_rate("forward", 550e12)),
    Mark(EXPERTS, BOTH, "450 TFLOP/s", at_rate(BOTH, 450e12)),
    Mark(_case("route", T=4096, E=256, K=8), "forward", "10 microseconds", at_most(10e-6)),
)
