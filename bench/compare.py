"""Two results side by side: what became faster or slower, with eager PyTorch as the control.

A machine that is busier, or another one, moves everyone; so a verdict takes the change of our time over the change of
eager's in the same case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import results
from .report.table import MISSING, Cell, Table, milliseconds, small, times

# changes below this are within what two runs on one machine differ by
BAND = 0.15


def table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """A row for each case and implementation of ours that both results hold, or that stopped or began to work."""
    made = before["environment"]
    found = Table(
        "Changes",
        (
            "case",
            "implementation",
            "before, ms",
            "after, ms",
            "after / before",
            "eager's",
            "error",
            "verdict",
        ),
        note=(
            f"Against {before['date']}, commit {made['commit']}: shortest rounds of forward and backward. The verdict "
            f"allows for what eager PyTorch changed by, and for {100 * BAND:.0f} % of noise."
        ),
    )
    known = {case["id"]: case for case in before["cases"]}
    for case in after["cases"]:
        if case["id"] in known:
            found.rows += [_row(known[case["id"]], case, row) for row in results.ours(case)]
    return found


def _row(old_case: Mapping[str, Any], case: Mapping[str, Any], row: Mapping[str, Any]) -> list[Cell]:
    phase = results.main_phase(case)
    names = [Cell(results.title(case)), Cell(row["peer"])]
    was, now = _shortest(results.named(old_case, row["peer"]), row, phase)
    error = Cell(small(results.worst_error(row, phase)))
    times_cells = [Cell(milliseconds(was)), Cell(milliseconds(now))]
    if now is None or was is None:
        verdict = (
            Cell("FAILED", "failed")
            if row["status"] == "failed"
            else Cell("no time before" if now else "no time")
        )
        return [*names, *times_cells, MISSING, MISSING, error, verdict]
    control = _control(old_case, case, phase)
    change = now / was / (control or 1.0)
    verdict = (
        Cell("slower", "failed")
        if change > 1 + BAND
        else Cell("faster", "best")
        if change < 1 - BAND
        else Cell("same")
    )
    shown = Cell(times(control)) if control else MISSING
    return [*names, *times_cells, Cell(times(now / was)), shown, error, verdict]


def _shortest(
    old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, phase: str
) -> tuple[float | None, float | None]:
    """The shortest rounds of both; of first calls where a turn makes several in only one of the two."""
    if old and new and (phase in old["cold"]) != (phase in new["cold"]):
        old, new = results.of_first_calls(old), results.of_first_calls(new)
    return (
        results.fastest(old, phase) if old else None,
        results.fastest(new, phase) if new else None,
    )


def _control(old_case: Mapping[str, Any], case: Mapping[str, Any], phase: str) -> float | None:
    """How eager PyTorch changed, by its shortest rounds."""
    was, now = _shortest(results.eager(old_case), results.eager(case), phase)
    return now / was if was and now else None
