"""The results of a run: one JSON file (docs/benchmarks.md tells its fields), and the questions that reports ask of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import Case, Work
from .ceilings import Ceilings
from .measure import Row
from .peers import EAGER

SCHEMA = 2
WIDTH = 120  # of a line of a file
# before the first calls of turns were told apart from those after them
_ONE_CALL_A_TURN = 1


def case_record(case: Case, rows: Sequence[Row], ceilings: Ceilings, load: Sequence[float]) -> dict[str, Any]:
    """One measured case as JSON."""
    floors = ceilings.floors(case)
    phases = {}
    for phase, (seconds, bound) in floors.items():
        parts = [case.work()[part] for part in (("forward", "backward") if "+" in phase else (_part(phase),))]
        phases[phase] = {
            "bytes": sum(part.bytes for part in parts),
            "flops": sum(part.flops for part in parts),
            "exps": sum(part.exps for part in parts),
            "floor_seconds": short(seconds),
            "bound": bound,
        }
    return {
        "id": case.id,
        "op": case.op,
        "family": case.family,
        "dtype": case.dtype,
        "sizes": dict(case.sizes),
        "layout": case.layout,
        "model": case.model,
        "quick": case.quick,
        "load": [round(value, 2) for value in load],
        "phases": phases,
        "rows": [_row_record(row) for row in rows],
    }


def set_floors(case: Mapping[str, Any], ceilings: Ceilings) -> None:
    """The floors of a case in a record again, under other ceilings."""
    works = {
        phase: Work(**{name: found[name] for name in ("bytes", "flops", "exps")})
        for phase, found in case["phases"].items()
        if phase in ("forward", "backward")
    }
    for phase, (seconds, bound) in ceilings.floors_of(works, case["dtype"]).items():
        case["phases"][phase] |= {"floor_seconds": short(seconds), "bound": bound}


def _part(phase: str) -> str:
    return "forward" if phase == "inference" else phase


def _row_record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    for kind in ("samples", "cold"):
        record[kind] = {name: [short(value) for value in found] for name, found in record[kind].items()}
    for name in ("errors", "limits", "overhead"):
        record[name] = {key: short(value) for key, value in record[name].items()}
    return record


def short(value: float) -> float | None:
    """Four digits, which is more than a clock repeats; None for what JSON cannot hold."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write results; a run that is cut off leaves the file of the last finished case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(_text(results) + "\n", encoding="utf-8")
    temporary.replace(path)


def _text(value: Any, indent: int = 0) -> str:
    """JSON whose lines are filled; a list of numbers stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    numbers = isinstance(value, list) and all(isinstance(each, (int, float, type(None))) for each in value)
    if not isinstance(value, (dict, list)) or numbers or len(line) + indent <= WIDTH:
        return line
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(key, ensure_ascii=False)}: {_text(each, indent + 1)}" for key, each in value.items()
        ]
        opened, closed = "{}"
    else:
        parts = [_text(each, indent + 1) for each in value]
        opened, closed = "[]"
    lines: list[str] = []
    for part in parts:
        fits = bool(lines) and "\n" not in lines[-1] + part and len(lines[-1] + part) + indent + 3 <= WIDTH
        lines[-1:] = [f"{lines[-1]}, {part}"] if fits else [*lines[-1:], part]
    space = "\n" + " " * (indent + 1)
    return f"{opened}{space}{(',' + space).join(lines)}\n{' ' * indent}{closed}"


def load(path: Path) -> dict[str, Any]:
    """Read results; in those of schema 1 every turn is one call.

    Raises:
        ValueError: the file is of no schema that is known.
    """
    results: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    if results.get("schema") not in (_ONE_CALL_A_TURN, SCHEMA):
        raise ValueError(
            f"{path}: expected benchmark results of schema {_ONE_CALL_A_TURN} or {SCHEMA}, "
            f"got {results.get('schema')!r}"
        )
    if results["schema"] == _ONE_CALL_A_TURN:
        results["schema"] = SCHEMA
        # the cases of ``bench saved`` have no rows
        for row in (row for case in results["cases"] for row in case.get("rows", ())):
            row |= {"cold": {}, "calls": {}, "overhead": {}}
    return results


# --- questions ---


def median(row: Mapping[str, Any], phase: str) -> float | None:
    """Median seconds of a phase, or None where it has no time."""
    samples = row["samples"].get(phase)
    return statistics.median(samples) if samples and row["status"] == "ok" else None


def fastest(row: Mapping[str, Any], phase: str) -> float | None:
    """The shortest round of a phase."""
    samples = row["samples"].get(phase)
    return min(samples) if samples and row["status"] == "ok" else None


def has_first_calls(case: Mapping[str, Any], phase: str) -> bool:
    """Whether a turn of someone makes several calls in this phase, of which the first is told apart."""
    return any(phase in row["cold"] for row in case["rows"])


def first_calls(case: Mapping[str, Any]) -> dict[str, Any]:
    """The case as the first call of every turn shows it."""
    return {**case, "rows": [of_first_calls(row) for row in case["rows"]]}


def of_first_calls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose samples are the first calls; the only call of a turn is its first."""
    return {**row, "samples": {**row["samples"], **row["cold"]}}


def ratio(theirs: Mapping[str, Any], ours: Mapping[str, Any], phase: str) -> float | None:
    """How many times longer they take, paired: the median over rounds of their time by ours in the same round."""
    pairs = zip(theirs["samples"].get(phase, ()), ours["samples"].get(phase, ()), strict=False)
    values = [other / own for other, own in pairs if own > 0]
    if not values or theirs["status"] != "ok" or ours["status"] != "ok":
        return None
    return statistics.median(values)


def ours(case: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Our rows of a case, the one that stands for the op first."""
    return (row for row in case["rows"] if row["kind"] == "ours")


def main_row(case: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of ours that stands for the op, whatever came out of it."""
    return next(ours(case), None)


def named(case: Mapping[str, Any], peer: str) -> dict[str, Any] | None:
    """The row of an implementation."""
    return next((row for row in case["rows"] if row["peer"] == peer), None)


def eager(case: Mapping[str, Any]) -> dict[str, Any] | None:
    return named(case, EAGER)


def rounds_spread(row: Mapping[str, Any], phase: str) -> float | None:
    """Median over shortest round of a phase: how far its rounds repeat."""
    found, least = median(row, phase), fastest(row, phase)
    return found / least if found and least else None


def best_peer(case: Mapping[str, Any], phase: str) -> dict[str, Any] | None:
    """The fastest implementation of someone else that gives right results."""
    timed = [
        (found, row)
        for row in case["rows"]
        if row["kind"] == "peer" and (found := median(row, phase)) is not None
    ]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def worst_error(row: Mapping[str, Any], phase: str) -> float | None:
    """The largest error of what a phase computes: results forward, gradients backward."""
    values = [
        value
        for name, value in row["errors"].items()
        if phase in ("forward+backward", "step") or name.startswith("d ") == (phase == "backward")
    ]
    if any(value is None for value in values):
        return math.inf
    return max(values) if values else None


def main_phase(case: Mapping[str, Any]) -> str:
    """The phase that a headline shows: the whole step where it is one, else forward+backward."""
    return "step" if case["op"] == "grpo_step" else "forward+backward"


def loads(record: Mapping[str, Any]) -> list[float]:
    """The load averages before and after each case."""
    return [value for case in record["cases"] for value in case["load"]]


def noises(record: Mapping[str, Any]) -> list[float]:
    """How far a fixed work repeated itself before and after each case (noise.of_machine)."""
    return [value for case in record["cases"] for value in case.get("noise", ())]


def commits(record: Mapping[str, Any]) -> list[str]:
    """Of what was measured, in order of first use."""
    made = record["environment"]["commit"]
    return list(dict.fromkeys(case.get("commit", made) for case in record["cases"])) or [made]


def title(case: Mapping[str, Any]) -> str:
    """ "token_logprobs, N 2048, V 32768, float32" """
    parts = [case["op"], ", ".join(f"{name} {size}" for name, size in case["sizes"].items()), case["dtype"]]
    return ", ".join(part for part in [*parts, case["layout"], case["model"]] if part)
