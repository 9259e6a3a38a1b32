"""Is the machine quiet? The same short work again and again takes the same time on one that is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from .timing import Clock

# a median this much above the shortest time says that something else is at work
MACHINE_LIMIT = 1.15
# the same for the rounds of a kernel, which wait for memory too
ROUNDS_LIMIT = 1.3
_TIMES = 100


def spread(seconds: Sequence[float]) -> float:
    """Median over shortest: 1 for times that repeat exactly."""
    return statistics.median(seconds) / min(seconds)


def of_machine(device: torch.device) -> float:
    """The spread of short products of matrices on all threads, or on the whole GPU."""
    size = 4096 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    product = torch.empty_like(left)
    clock = Clock(device)
    for _ in range(5):
        torch.mm(left, right, out=product)
    for _ in range(_TIMES + 1):
        clock.mark()
        torch.mm(left, right, out=product)
    return spread(clock.seconds())
