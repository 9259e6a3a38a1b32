"""One case, measured: every implementation checked against float64, then all of them timed in turns, A B A B."""

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import memory, timing, turns
from .ops import families
from .ops.cases import Case
from .ops.numerics import Exact, allowed
from .ops.peers import EAGER, Inputs, Peer, Unavailable
from .results import Row, settle

MOST_ROUNDS, FEWEST_ROUNDS = 40, 5
# of a round that is longer than this, three have to do; of one longer than that, two
_LONG_SECONDS, _VERY_LONG_SECONDS = 6.0, 60.0
# whoever takes this many times as long as we do is timed once where a round is long
_FAR_BEHIND = 3.0
# whose products alone take longer in a call is not called
_PATIENCE_SECONDS = 60.0
_L2_BYTES = 128 << 20
# what takes turns of its own
_MODES = ("inference", "forward+backward")


def seconds_of(device: str, quick: bool) -> float:
    """For all timed rounds of a case together. A GPU repeats itself better, and its minutes are dear."""
    return (1.5 if quick else 3.0) if device == "cuda" else (8.0 if quick else 10.0)


def measure(
    case: Case, seconds: float, compiles: bool = True, ours: bool = False, of_torch: float = 0.0
) -> list[Row]:
    """Rows of all implementations of a case; without ``compiles`` of those that need no compilation, with ``ours`` of ours.

    seconds: that all timed rounds may take together; 0: a few rounds, in which no time is meant.
    of_torch: seconds of the products of a call as torch multiplies; where they are too many, ours alone are called.

    Raises:
        Unavailable: the case does not fit the memory of the machine.
    """
    device, op = torch.device(case.device), families.OPS[case.op]
    need, free = case.need_bytes(), memory.available_bytes(device)
    if need > free:
        raise Unavailable(f"needs about {need / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free")
    peers = op.peers_on(case.device, compiles, ours)
    called = [peer for peer in peers if peer.kind == "ours" or of_torch <= _PATIENCE_SECONDS]
    found = {row.peer: row for row in race(case, called, *op.problem(case, device), seconds)}
    reason = f"torch's own products take {of_torch:.0f} s here in {case.dtype}"
    rows = [
        found.get(peer.name) or Row(peer.name, peer.kind, peer.package, "unavailable", reason)
        for peer in peers
    ]
    median = next((row.median("forward+backward") for row in rows if row.kind == "ours"), None)
    print(f"  r1kernels {1e3 * (median or float('nan')):.3f} ms forward+backward", flush=True)
    return rows


def race(
    case: Case, peers: Sequence[Peer], inputs: Inputs, exact: dict[str, Exact], seconds: float
) -> list[Row]:
    """Rows of these implementations, in their order."""
    every = [_Running(peer, Row(peer.name, peer.kind, peer.package)) for peer in peers]
    for one in every:
        one.call = first_call(case, one.peer, one.row, inputs, exact)
    rows = [one.row for one in every]
    judge(rows, case)
    running = [one for one in every if one.row.status == "ok"]
    # neighbours may be two forms of one kernel: the turn of one would leave its code in the caches for the other
    running = running[::2] + running[1::2]
    if running:
        _time(running, inputs, torch.device(case.device), seconds)
    settle(rows)
    return rows


def judge(rows: list[Row], case: Case) -> None:
    """The numeric rule, against the errors of eager PyTorch in the same dtype."""
    eager = next((row.errors for row in rows if row.peer in (EAGER, "plain PyTorch")), {})
    for row in rows:
        limits = {name: allowed(eager.get(name), case.torch_dtype) for name in row.errors}
        broken = [
            f"{name}: error {found:.2g} above the allowed {limits[name]:.2g}"
            for name, found in row.errors.items()
            if found is None or not found <= limits[name]
        ]
        if broken and row.status == "ok":
            row.status, row.reason = "failed", "; ".join(broken)


def first_line(problem: Exception) -> str:
    """The kind of an error and the first line of its text, which is enough for a table."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__


def load_average() -> float:
    """Of the last minute: how busy the machine is."""
    return round(os.getloadavg()[0], 2)


def release() -> None:
    """Forget what a case left behind, compiled graphs too."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the first call: is it right, and what does it keep ---


def first_call(case: Case, peer: Peer, row: Row, inputs: Inputs, exact: dict[str, Exact]) -> Any:
    """Errors, peak and saved bytes of one implementation; what to call in the timed rounds."""
    device, op = torch.device(case.device), families.OPS[case.op]
    clock = timing.Clock(device)
    try:
        call = peer.make(case, inputs)
        if peer.kind == "floor":
            timing.floor(call, clock)
            return call
        if peer.kind == "ours":
            row.backend = op.ours.backend(case, inputs)
        if peer.compiles:
            timing.train(call, peer.fresh(inputs), clock)
        ready = peer.fresh(inputs)
        with memory.Peak(device) as peak:
            with memory.counting_saved(list(inputs.of("weight,teacher_weight,gate_up,down"))) as saved:
                outputs = call(ready)
            gradients = ready.gradients(outputs)
        row.peak_bytes, row.saved_bytes = peak.bytes, saved.bytes
        row.errors = dict(op.errors({**outputs, **gradients}, exact))
        if not row.errors:
            raise Unavailable("it gives no result that can be compared")
        if "inference" in peer.phases:
            timing.infer(call, inputs, clock)
        return call
    except Unavailable as reason:
        row.status, row.reason = "unavailable", str(reason)
    except torch.OutOfMemoryError:
        row.status, row.reason = "unavailable", "out of memory"
    except Exception as problem:
        _stopped(row, first_line(problem))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _stopped(row: Row, reason: str) -> None:
    """Someone else's package may fail in any way; ours must not."""
    row.status, row.reason = "failed" if row.kind == "ours" else "unavailable", reason
    row.rounds.clear()
    row.firsts.clear()


# --- the timed rounds ---


@dataclass
class _Running:
    peer: Peer
    row: Row
    call: Any = None
    replayed: timing.Replayed | None = None

    def once(self, mode: str, inputs: Inputs, clock: timing.Clock) -> Callable[[], timing.Phases] | None:
        """One call in a mode; None where the implementation has no turn in it."""
        replayed, peer = self.replayed, self.peer
        if replayed is not None or peer.kind == "floor":  # all phases at once
            if mode == "inference":
                return None
            return lambda: replayed.sample(clock) if replayed else timing.floor(self.call, clock)
        if mode != "inference":
            return lambda: timing.train(self.call, peer.fresh(inputs), clock)
        return (lambda: timing.infer(self.call, inputs, clock)) if mode in peer.phases else None

    def replay(self, sets: list[Inputs]) -> None:
        """Put a short call into CUDA graphs; where it cannot be captured its launches are part of its time."""
        rounds = self.row.rounds
        short = rounds and rounds["forward+backward"][0] < 2 * timing.GRAPH_BELOW_SECONDS
        rounds.clear()
        if short and self.peer.kind != "floor" and self.peer.prepare is None:
            try:
                self.replayed = timing.Replayed(self.call, sets, self.peer.phases)
            except RuntimeError as problem:
                self.row.reason = f"not captured in a CUDA graph: {first_line(problem)}"
                torch.cuda.synchronize()


def _time(running: list[_Running], inputs: Inputs, device: torch.device, seconds: float) -> None:
    """Rounds in which everyone has a turn, until the time is spent; how long the first takes says how many."""
    clock, sets = timing.Clock(device), _rotating(inputs, device)
    if device.type == "cuda" or not seconds:
        # graphs of short calls are replayed many times anyway
        for one in running:
            one.row.calls = dict.fromkeys(_MODES, 1)
    first = _round(running, inputs, clock)
    if device.type == "cuda":
        for one in running:
            one.replay(sets)
        first = _round(running, inputs, clock)
    far = _far_behind([one.row for one in running]) if sum(first.values()) > _LONG_SECONDS else set()
    close = [one for one in running if one.row.peer not in far]
    for number in range(1, _rounds(sum(first.get(one.row.peer, 0.0) for one in close), seconds)):
        _round(close, sets[number % len(sets)], clock)


def _rounds(seconds: float, of_all: float) -> int:
    """How many rounds of so many seconds are made in those of all."""
    fewest = FEWEST_ROUNDS if seconds < _LONG_SECONDS else 3 if seconds < _VERY_LONG_SECONDS else 2
    return max(fewest, min(MOST_ROUNDS, int(of_all / max(seconds, 1e-9))))


def _far_behind(rows: list[Row]) -> set[str]:
    """Those who took _FAR_BEHIND times as long as our fastest; more rounds would not bring them closer."""
    taken = {row.peer: row.rounds["forward+backward"][0] for row in rows if row.status == "ok"}
    ours = [taken[row.peer] for row in rows if row.kind == "ours" and row.peer in taken]
    return {name for name, seconds in taken.items() if ours and seconds > _FAR_BEHIND * min(ours)}


def _round(running: list[_Running], inputs: Inputs, clock: timing.Clock) -> dict[str, float]:
    """A turn of everyone in each mode; adds to the rounds and returns the seconds of each. Whoever fails now is out."""
    taken: dict[str, float] = {}
    for mode in _MODES:
        for one in running:
            row, once = one.row, one.once(mode, inputs, clock)
            if row.status != "ok" or once is None:
                continue
            began = time.perf_counter()
            try:
                turn = turns.take(once, row.calls.get(mode))
            except RuntimeError as problem:
                _stopped(row, f"stopped while it was timed: {first_line(problem)}")
                taken.pop(row.peer, None)
                continue
            row.calls[mode] = turn.calls
            for kept, found in ((row.rounds, turn.samples), (row.firsts, turn.cold)):
                for phase in set(one.peer.phases) & set(found):
                    kept.setdefault(phase, []).append(found[phase])
            taken[row.peer] = taken.get(row.peer, 0.0) + time.perf_counter() - began
    return taken


def _rotating(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """On a GPU copies of the inputs that together pass its L2 cache; on a CPU the inputs themselves."""
    size = sum(tensor.nbytes for tensor in inputs.tensors.values())
    if device.type == "cpu" or size > _L2_BYTES:
        return [inputs]

    def copied() -> Inputs:
        tensors = {name: one.detach().clone() for name, one in inputs.tensors.items()}
        return replace(inputs, tensors=tensors).require_grad()

    return [copied() for _ in range(min(-(-_L2_BYTES // max(size, 1)), 16))]
