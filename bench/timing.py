"""Clocks: how long the phases of one call take, on a CPU by the wall clock, on a GPU by events or graph replays."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from .ops.peers import Inputs, Outputs

Phases = dict[str, float]
# kernels shorter than this are launched slower than they run: they are timed as replays of a graph
GRAPH_BELOW_SECONDS = 2e-4
_REPLAYS = 20


class Clock:
    """Seconds between marks: of the wall on a CPU, of the device's own timeline on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next; starts over."""
        marks, self._marks = self._marks, []
        if not self._cuda:
            return [after - before for before, after in pairwise(marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def repeated(function: Callable[[], object], device: torch.device, times: int, calls: int = 1) -> list[float]:
    """So many times the seconds of so many calls, behind one that warms up."""
    clock = Clock(device)
    function()
    for _ in range(times):
        clock.mark()
        for _ in range(calls):
            function()
    clock.mark()
    return clock.seconds()


def train(call: Callable[[Inputs], Outputs], inputs: Inputs, clock: Clock) -> Phases:
    """One forward that records and its backward."""
    clock.mark()
    outputs = call(inputs)
    clock.mark()
    above = inputs.above(outputs)
    clock.mark()
    gradients = inputs.gradients(outputs, above)
    clock.mark()
    forward, _, backward = clock.seconds()
    # what autograd kept is given back here, outside of the clock
    del outputs, above, gradients
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def infer(call: Callable[[Inputs], Outputs], inputs: Inputs, clock: Clock) -> Phases:
    """One forward without gradients."""
    with torch.no_grad():
        clock.mark()
        outputs = call(inputs)
        clock.mark()
    (seconds,) = clock.seconds()
    del outputs
    return {"inference": seconds}


def floor(functions: dict[str, Callable[[], object]], clock: Clock) -> Phases:
    """The parts of an implementation of kind "floor"."""
    found: Phases = {}
    for phase, function in functions.items():
        clock.mark()
        result = function()
        clock.mark()
        (found[phase],) = clock.seconds()
        del result
    return {**found, "inference": found["forward"], "forward+backward": sum(found.values())}


class Replayed:
    """Short calls captured into CUDA graphs, over several sets of inputs that do not fit the L2 cache together.

    Captures ``inference``, ``forward`` and ``forward+backward``; the backward is their difference.

    Raises RuntimeError, as torch does, for a call that cannot be captured (one that waits for the device).
    """

    def __init__(
        self, call: Callable[[Inputs], Outputs], sets: list[Inputs], phases: tuple[str, ...]
    ) -> None:
        self._sets = len(sets)
        self._graphs: dict[str, Any] = {}

        def both(inputs: Inputs) -> object:
            return inputs.gradients(call(inputs))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for inputs in sets:
                both(inputs)
        torch.cuda.current_stream().wait_stream(side)
        for phase, function in (("inference", call), ("forward", call), ("forward+backward", both)):
            if phase in phases:
                graph = self._graphs[phase] = torch.cuda.CUDAGraph()
                with torch.set_grad_enabled(phase != "inference"), torch.cuda.graph(graph):
                    for inputs in sets:
                        function(inputs)

    def sample(self, clock: Clock) -> Phases:
        """Seconds a call, each phase a few replays long."""
        found: Phases = {}
        for phase, graph in self._graphs.items():
            clock.mark()
            for _ in range(_REPLAYS):
                graph.replay()
            clock.mark()
            (seconds,) = clock.seconds()
            found[phase] = seconds / (_REPLAYS * self._sets)
        found["backward"] = max(found["forward+backward"] - found["forward"], 0.0)
        return found
