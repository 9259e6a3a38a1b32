"""pytest-benchmark runs one implementation at a time; here all of a case are timed in turn, and it is shown the samples.

A case is measured once a session, everybody in the same rounds. The test of each implementation then hands its samples
to ``benchmark.pedantic``, whose timer reads them back: minimum, median and JSON are those of the real rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from . import ceilings, results, run
from .cases import CASES, FAMILIES, Case, tiny
from .measure import Effort, Row, release
from .peers import PHASES, Unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Replay:
    """A timer for pytest-benchmark: two readings a round, as far apart as the next sample."""

    def __init__(self) -> None:
        self._readings: list[float] = []

    def load(self, samples: Sequence[float]) -> None:
        """The rounds to play; each starts where the one before ended."""
        self._readings, now = [], 0.0
        for seconds in samples:
            self._readings += [now, now + seconds]
            now += seconds
        self._readings.reverse()

    def __call__(self) -> float:
        return self._readings.pop()


REPLAY = Replay()


class Session:
    """What a pytest session has measured, by case; ``record`` is what ``python -m bench run`` writes."""

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        self.found = ceilings.measure(torch.device(DEVICE), rounds=1 if smoke else 5)
        self.record = run.begin(DEVICE, True, self.found, [])
        self._rows: dict[str, list[Row] | str] = {}

    def row(self, case: Case, peer: str) -> Row:
        """The row of an implementation; skips where the case or the implementation can not run here."""
        if case.id not in self._rows:
            self._rows[case.id] = self._measure(case)
        rows = self._rows[case.id]
        if isinstance(rows, str):
            pytest.skip(rows)
        row = next(row for row in rows if row.peer == peer)
        if row.status == "unavailable":
            pytest.skip(row.reason)
        return row

    def _measure(self, case: Case) -> list[Row] | str:
        effort = Effort(0.0) if self.smoke else Effort.of(DEVICE, quick=True)
        try:
            rows = run.rows(case, effort, lambda text: None, compiles=not self.smoke)
        except Unavailable as reason:
            return str(reason)
        self.record["cases"].append(results.case_record(case, rows, self.found, ()))
        release()
        return rows


def cases(family: str, smoke: bool) -> list[Case]:
    """The quick cases of this device; in a smoke test every op at tiny shapes."""
    known = tiny(DEVICE) if smoke else [case for case in CASES if case.quick and case.device == DEVICE]
    return [case for case in known if case.op in FAMILIES[family]]


def parametrize(metafunc: pytest.Metafunc, family: str) -> None:
    """One test for each case, implementation and phase."""
    smoke = bool(metafunc.config.getoption("benchmark_disable"))
    found = []
    for case in cases(family, smoke):
        names = run.names(case, compiles=not smoke)
        phases: Sequence[str] = ("step",) if case.op == "grpo_step" else PHASES
        for phase in ("forward+backward",) if smoke and len(phases) > 1 else phases:
            found += [pytest.param(case, name, phase, id=f"{case.id}-{phase}-{name}") for name in names]
    metafunc.parametrize(("case", "peer", "phase"), found)


def play(session: Session, benchmark: Any, case: Case, peer: str, phase: str) -> None:
    """Show one implementation's samples of a phase to pytest-benchmark, with what belongs to them."""
    row = session.row(case, peer)
    if row.status == "failed":
        pytest.fail(f"{peer}: {row.reason}", pytrace=False)
    samples = row.samples.get(phase)
    if not samples:
        pytest.skip(f"{peer} is not compared in {phase}")
    benchmark.group = f"{case.id} {phase}"
    floors = session.found.floors(case).get(phase)
    benchmark.extra_info.update(
        {
            "errors": row.errors,
            "limits": row.limits,
            "first_calls": row.cold.get(phase, []),
            "peak_bytes": row.peak_bytes,
            "saved_bytes": row.saved_bytes,
            "floor_seconds": floors[0] if floors else None,
            "bound": floors[1] if floors else None,
        }
    )
    REPLAY.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
