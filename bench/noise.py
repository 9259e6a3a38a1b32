"""Is the machine quiet? The same short work again and again takes the same time on one that is."""

import statistics
from collections.abc import Sequence

import torch

from .timing import repeated

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
    left, right, product = (torch.randn(size, size, device=device) for _ in range(3))
    return spread(repeated(lambda: torch.mm(left, right, out=product), device, _TIMES))
