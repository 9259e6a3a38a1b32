"""Turns: what an implementation does before the next one has its own; docs/benchmarks.md tells why.

A long call is a turn of its own. A short one is made several times, as timeit does, and its turn has two results: the first call,
apart, and the median of those after it, which one interruption does not move.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from .timing import Phases

# ten times what the caches take: a call this long is a turn, of shorter ones as many as last this long together
SECONDS = 10e-3
# a first call that is shorter may have been interrupted, and the second is asked too
_SURELY_LONG = 10 * SECONDS
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Turn:
    """samples: seconds of each phase. cold: those of the first call, empty if it is the only one. calls: how many."""

    samples: Phases
    cold: Phases
    calls: int


def take(once: Callable[[], Phases], calls: int | None = None) -> Turn:
    """One turn of so many calls; without a number, as for the first turn, the shortest call tells it."""
    first = once()
    shortest = _whole(first)
    if calls == 1 or (calls is None and shortest >= _SURELY_LONG):
        return Turn(first, {}, 1)
    later: list[Phases] = []
    for _ in range((calls or _MOST_CALLS) - 1):
        later.append(once())
        shortest = min(shortest, _whole(later[-1]))
        if calls is None and len(later) * shortest >= SECONDS:
            break
    if calls is None and shortest >= SECONDS:
        return Turn(first, {}, 1)
    samples = {phase: statistics.median(call[phase] for call in later) for phase in first}
    return Turn(samples, first, 1 + len(later))


def _whole(call: Phases) -> float:
    """Seconds of a call: "forward+backward" holds the phases beside it."""
    return max(call.values())
