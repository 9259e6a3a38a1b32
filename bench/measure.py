"""One case, measured: every implementation checked against float64, then all of them timed in turns, A B A B."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import families, memory, timing, turns
from .cases import Case, smallest
from .numerics import Exact, allowed, error
from .peers import EAGER, Inputs, Peer, Unavailable, version

MOST_ROUNDS, FEWEST_ROUNDS = 40, 5
# of a round that is longer than this, three have to do; of one longer than that, two
_LONG_SECONDS, _VERY_LONG_SECONDS = 6.0, 60.0
# whoever takes this many times as long as we do is timed once where a round is long
_FAR_BEHIND = 3.0
_L2_BYTES = 128 << 20
# what takes turns of its own
_MODES = ("inference", "forward+backward")


@dataclass(frozen=True)
class Effort:
    """How long a case may take: seconds for all timed rounds together."""

    seconds: float

    @classmethod
    def of(cls, device: str, quick: bool) -> Effort:
        """A GPU repeats itself better, and its minutes are dear."""
        if device == "cuda":
            return cls(1.5) if quick else cls(3.0)
        return cls(8.0) if quick else cls(10.0)


@dataclass
class Row:
    """What was found about one implementation in one case.

    status: "ok", "failed" (its numbers break the rule: it gets no time) or "unavailable"; reason says why.
    errors, limits: name of a result -> its error against float64, and what the rule allows.
    samples: phase -> seconds of every round. cold: phase -> seconds of the first call of every turn, where a turn makes
    several (see turns.py). calls: "inference" or "forward+backward" -> how many a turn makes.
    overhead: of ours where a turn makes several calls, phase -> seconds of one at a shape so small that next to no work
    is left.
    """

    peer: str
    kind: str
    package: str
    version: str | None
    status: str = "ok"
    reason: str = ""
    backend: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    cold: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    overhead: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    saved_bytes: int | None = None


@dataclass
class _Running:
    peer: Peer
    row: Row
    call: Any
    replayed: timing.Replayed | None = None


def measure(
    case: Case,
    effort: Effort,
    compiles: bool = True,
    progress: Callable[[str], None] = print,
    ours: bool = False,
) -> list[Row]:
    """Rows of all implementations of a case; without ``compiles`` of those that need no compilation, with ``ours`` of ours.

    Raises:
        Unavailable: the case does not fit the memory of the machine.
    """
    device = torch.device(case.device)
    need, free = case.need_bytes(), memory.available_bytes(device)
    if need > free:
        raise Unavailable(f"needs about {need / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free")
    op = families.OPS[case.op]
    inputs = op.inputs(case, device)
    exact = op.exact(case, inputs)
    for leaf in inputs.leaves:
        inputs[leaf].requires_grad_()
    running, rows = [], []
    for peer in op.peers_on(case.device, compiles, ours):
        row = Row(peer.name, peer.kind, peer.package, version(peer.package))
        rows.append(row)
        call = _first_calls(case, peer, row, inputs, exact)
        if row.status == "ok":
            running.append(_Running(peer, row, call))
    _judge(rows, case)
    running = [one for one in running if one.row.status == "ok"]
    # neighbours may be two forms of one kernel: the turn of one would leave its code in the caches for the other
    running = running[::2] + running[1::2]
    if running:
        _time(running, inputs, case, effort, progress)
    for one in running:
        if one.row.kind == "ours" and one.row.cold:
            one.row.overhead = _overhead(one, case)
    return rows


def _first_calls(case: Case, peer: Peer, row: Row, inputs: Inputs, exact: dict[str, Exact]) -> Any:
    """Errors, peak and saved bytes of one implementation; what to call in the timed rounds."""
    device, op = torch.device(case.device), families.OPS[case.op]
    try:
        call = peer.make(case, inputs)
        if peer.kind == "floor":
            with memory.Peak(device):
                timing.floor(call, timing.Clock(device))
            return call
        if peer.kind == "ours":
            row.backend = op.ours.backend(case, inputs)
        if peer.compiles:
            timing.train(call, _fresh(peer, inputs), timing.Clock(device))
        ready = _fresh(peer, inputs)
        named = ("weight", "teacher_weight", "gate_up", "down")
        parameters = [inputs[name] for name in named if name in inputs.tensors]
        with memory.Peak(device) as peak:
            with memory.counting_saved(parameters) as saved:
                outputs = call(ready)
            found = {**outputs, **timing.differentiate(*timing.upstream(outputs, ready), ready)}
        found = op.comparable(found)
        row.peak_bytes, row.saved_bytes = peak.bytes, saved.bytes
        row.errors = {name: error(found[name], exact[name]) for name in found if name in exact}
        if not row.errors:
            raise Unavailable("it gives no result that can be compared")
        if "inference" in peer.phases:
            timing.infer(call, inputs, timing.Clock(device))
        return call
    except Unavailable as reason:
        row.status, row.reason = "unavailable", str(reason)
    except torch.OutOfMemoryError:
        row.status, row.reason = "unavailable", "out of memory"
    except Exception as problem:
        # someone else's package may fail in any way; ours must not
        row.status = "failed" if peer.kind == "ours" else "unavailable"
        row.reason = first_line(problem)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _judge(rows: list[Row], case: Case) -> None:
    """The numeric rule, against the errors of eager PyTorch in the same dtype."""
    eager = next((row.errors for row in rows if row.peer == EAGER), {})
    for row in rows:
        row.limits = {name: allowed(eager.get(name), case.torch_dtype) for name in row.errors}
        broken = [name for name, found in row.errors.items() if not found <= row.limits[name]]
        if broken and row.status == "ok":
            row.status = "failed"
            row.reason = "; ".join(
                f"{name}: error {row.errors[name]:.2g} above the allowed {row.limits[name]:.2g}"
                for name in broken
            )


def _time(
    running: list[_Running], inputs: Inputs, case: Case, effort: Effort, progress: Callable[[str], None]
) -> None:
    """Rounds in which everyone has a turn, until the time is spent; how long the first takes says how many."""
    device = torch.device(case.device)
    clock = timing.Clock(device)
    sets = _rotating(inputs, device)
    if device.type == "cuda" or not effort.seconds:
        # graphs of short calls are replayed many times anyway; without an effort no time is meant
        for one in running:
            one.row.calls = dict.fromkeys(_MODES, 1)
    first = _round(running, inputs, clock)
    if device.type == "cuda":
        for one in running:
            phases = one.row.samples
            short = phases and phases["forward+backward"][0] < 2 * timing.GRAPH_BELOW_SECONDS
            if short and one.peer.kind != "floor" and one.peer.prepare is None:
                one.replayed = _replayed(one, sets)
            phases.clear()
        first = _round(running, inputs, clock)
    far = _far_behind(running) if sum(first.values()) > _LONG_SECONDS else set()
    close = [one for one in running if one.row.peer not in far]
    rounds = _rounds(sum(first.get(one.row.peer, 0.0) for one in close), effort)
    for number in range(1, rounds):
        _round(close, sets[number % len(sets)], clock)
    ours = [one.row for one in running if one.row.kind == "ours" and "forward+backward" in one.row.samples]
    if ours:
        median = statistics.median(ours[0].samples["forward+backward"])
        progress(f"  {rounds} rounds, r1kernels {median * 1e3:.3f} ms forward+backward")


def _rounds(seconds: float, effort: Effort) -> int:
    """How many rounds of so many seconds are made."""
    fewest = FEWEST_ROUNDS if seconds < _LONG_SECONDS else 3 if seconds < _VERY_LONG_SECONDS else 2
    return max(fewest, min(MOST_ROUNDS, int(effort.seconds / max(seconds, 1e-9))))


def _far_behind(running: list[_Running]) -> set[str]:
    """Those who took _FAR_BEHIND times as long as our fastest; more rounds would not bring them closer."""
    rows = [one.row for one in running if one.row.status == "ok"]
    taken = {row.peer: row.samples["forward+backward"][0] for row in rows}
    ours = [taken[row.peer] for row in rows if row.kind == "ours"]
    return {name for name, seconds in taken.items() if ours and seconds > _FAR_BEHIND * min(ours)}


def _round(running: list[_Running], inputs: Inputs, clock: timing.Clock) -> dict[str, float]:
    """A turn of everyone in each mode; adds to the samples and returns the seconds of each. Whoever fails now is out."""
    taken: dict[str, float] = {}
    for mode in _MODES:
        for one in running:
            row, once = one.row, _once(one, mode, inputs, clock)
            if row.status != "ok" or once is None:
                continue
            began = time.perf_counter()
            try:
                turn = turns.take(once, row.calls.get(mode))
            except RuntimeError as problem:
                row.samples.clear()
                row.cold.clear()
                taken.pop(row.peer, None)
                row.status = "failed" if row.kind == "ours" else "unavailable"
                row.reason = f"stopped while it was timed: {first_line(problem)}"
                continue
            row.calls[mode] = turn.calls
            for kept, found in ((row.samples, turn.samples), (row.cold, turn.cold)):
                for phase in one.peer.phases:
                    if phase in found:
                        kept.setdefault(phase, []).append(found[phase])
            taken[row.peer] = taken.get(row.peer, 0.0) + time.perf_counter() - began
    return taken


def first_line(problem: Exception) -> str:
    """The kind of an error and the first line of its text, which is enough for a table."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__


def _once(
    one: _Running, mode: str, inputs: Inputs, clock: timing.Clock
) -> Callable[[], timing.Phases] | None:
    """One call in a mode; None where the implementation has no turn in it."""
    replayed = one.replayed
    if replayed is not None or one.peer.kind == "floor":
        # all phases at once
        if mode == "inference":
            return None
        return lambda: replayed.sample(clock) if replayed else timing.floor(one.call, clock)
    if mode != "inference":
        return lambda: timing.train(one.call, _fresh(one.peer, inputs), clock)
    return (lambda: timing.infer(one.call, inputs, clock)) if "inference" in one.peer.phases else None


def _overhead(one: _Running, case: Case) -> timing.Phases:
    """What a call takes at the smallest shape in the modes in which a turn makes several."""
    small, device = smallest(case), torch.device(case.device)
    inputs = families.OPS[case.op].inputs(small, device)
    for leaf in inputs.leaves:
        inputs[leaf].requires_grad_()
    there = replace(one, call=one.peer.make(small, inputs))
    found: timing.Phases = {}
    for mode in _MODES:
        once = _once(there, mode, inputs, timing.Clock(device))
        if once is not None and one.row.calls[mode] > 1:
            found |= turns.take(once).samples
    return found


def _replayed(one: _Running, sets: list[Inputs]) -> timing.Replayed | None:
    """A graph of the call, or None where it cannot be captured (then its launches are part of its time)."""
    try:
        return timing.Replayed(one.call, sets, one.peer.phases)
    except RuntimeError as problem:
        one.row.reason = f"not captured in a CUDA graph: {first_line(problem)}"
        torch.cuda.synchronize()
        return None


def _fresh(peer: Peer, inputs: Inputs) -> Inputs:
    return inputs if peer.prepare is None else peer.prepare(inputs)


def _rotating(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """On a GPU copies of the inputs that together pass its L2 cache; on a CPU the inputs themselves."""
    size = sum(tensor.nbytes for tensor in inputs.tensors.values())
    if device.type == "cpu" or size > _L2_BYTES:
        return [inputs]
    copies = []
    for _ in range(min(-(-_L2_BYTES // max(size, 1)), 16)):
        tensors = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
        for leaf in inputs.leaves:
            tensors[leaf].requires_grad_()
        copies.append(replace(inputs, tensors=tensors))
    return copies


def load_average() -> float:
    """Of the last minute: how busy the machine is."""
    return os.getloadavg()[0]


def release() -> None:
    """Forget what a case left behind, compiled graphs too."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
