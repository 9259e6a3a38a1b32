"""``python -m bench run``: measure cases one after another and keep what is done."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import ceilings, families, results, step
from .cases import CASES, FAMILIES, Case, tiny
from .environment import environment
from .measure import Effort, Row, load_average, measure, release
from .peers import Unavailable

OTHER_DEVICE = {
    "cpu": "needs a CUDA device: not measured on this one",
    "cuda": "a shape for the CPU: not run on a GPU",
}


@dataclass(frozen=True)
class Plan:
    """What to run. only: names of families or ops. quick: fewer shapes and rounds. tiny: every op at a tiny shape.

    limit: seconds after which no further case is begun. add: keep the cases that the file holds already.
    """

    device: str
    only: Sequence[str] = ()
    quick: bool = False
    tiny: bool = False
    limit: float = math.inf
    add: bool = False

    def cases(self) -> tuple[list[Case], list[tuple[Case, str]]]:
        """Cases to run, the quick ones first, and those that are not run with the reason."""
        known = {*FAMILIES, *(op for ops in FAMILIES.values() for op in ops)}
        unknown = sorted(set(self.only) - known)
        if unknown:
            raise SystemExit(
                f"--only: expected names out of {', '.join(sorted(known))}, got {', '.join(unknown)}"
            )
        run, left = [], []
        for case in tiny(self.device) if self.tiny else CASES:
            if self.only and case.family not in self.only and case.op not in self.only:
                continue
            if case.device != self.device:
                left.append((case, OTHER_DEVICE[self.device]))
            elif self.quick and not case.quick:
                left.append((case, "left out of a quick run"))
            else:
                run.append(case)
        return sorted(run, key=lambda case: not case.quick), left


def run(plan: Plan, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, write ``out`` after every case, and return the results."""
    began = time.monotonic()
    todo, left = plan.cases()
    say("the ceilings of this machine: copy, GEMM, exp")
    found = ceilings.measure(torch.device(plan.device))
    record = begin(plan.device, plan.quick or plan.tiny, found, left)
    if plan.add and out.is_file():
        _keep(record, results.load(out), {case.id for case in todo})
    effort = Effort(0.0) if plan.tiny else Effort.of(plan.device, plan.quick)
    for number, case in enumerate(todo, start=1):
        elapsed = time.monotonic() - began
        if elapsed > plan.limit:
            record["not_run"].append(_left_out(case, "no time was left"))
            continue
        say(f"[{number}/{len(todo)}] {case.id} ({elapsed:.0f} s)")
        before = load_average()
        try:
            found_rows = rows(case, effort, say, compiles=not plan.tiny)
        except Unavailable as reason:
            record["not_run"].append(_left_out(case, str(reason)))
            say(f"  not run: {reason}")
        else:
            record["cases"].append(results.case_record(case, found_rows, found, (before, load_average())))
            _say_failures(found_rows, say)
        release()
        record["load_after"] = round(load_average(), 2)
        record["seconds"] = round(time.monotonic() - began)
        results.save(out, record)
    order = {case.id: position for position, case in enumerate(CASES) if case.device == plan.device}
    record["cases"].sort(key=lambda case: order.get(case["id"], 0))
    results.save(out, record)
    return record


def _keep(record: dict[str, Any], before: dict[str, Any], again: set[str]) -> None:
    """Take over the cases of an older run that are not measured again, with their own floors and load."""
    record["cases"] = [case for case in before["cases"] if case["id"] not in again]
    have = {case["id"] for case in record["cases"]}
    record["not_run"] += before["not_run"]
    record["not_run"] = [
        entry
        for position, entry in enumerate(record["not_run"])
        if entry["id"] not in have | again
        and entry["id"] not in {other["id"] for other in record["not_run"][:position]}
    ]


def begin(
    device: str, quick: bool, found: ceilings.Ceilings, left: Sequence[tuple[Case, str]]
) -> dict[str, Any]:
    """The record of a run before its first case."""
    return {
        "schema": results.SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": quick,
        "environment": environment(device),
        "load_before": round(load_average(), 2),
        "ceilings": asdict(found),
        "cases": [],
        "not_run": [_left_out(case, reason) for case, reason in left],
    }


def names(case: Case, compiles: bool = True) -> list[str]:
    """The implementations of a case; without ``compiles`` those that need no compilation."""
    if case.op == "grpo_step":
        return list(step.BACKENDS)
    return [peer.name for peer in families.OPS[case.op].peers_on(case.device, compiles)]


def rows(case: Case, effort: Effort, say: Callable[[str], None], compiles: bool = True) -> list[Row]:
    """What is measured about a case.

    Raises:
        Unavailable: the case does not fit the memory of the machine.
    """
    if case.op == "grpo_step":
        return step.measure(case, effort, say)
    return measure(case, effort, compiles, say)


def _say_failures(rows: list[Row], say: Callable[[str], None]) -> None:
    for row in rows:
        if row.status == "failed":
            say(f"  FAILED {row.peer}: {row.reason}")


def _left_out(case: Case, reason: str) -> dict[str, Any]:
    return {"id": case.id, "op": case.op, "family": case.family, "device": case.device, "reason": reason}


def failed(record: dict[str, Any]) -> list[str]:
    """Our rows that failed: a run with any ends with an error."""
    return [
        f"{case['id']}: {row['reason']}"
        for case in record["cases"]
        for row in case["rows"]
        if row["status"] == "failed" and row["kind"] == "ours"
    ]


def main(plan: Plan, out: Path) -> int:
    """The command: 1 if a kernel of ours failed, else 0."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected cpu, got cuda on a machine without a CUDA device")
    record = run(plan, out, lambda text: print(text, flush=True))
    print(f"{out}: {len(record['cases'])} cases, {record.get('seconds', 0)} s", flush=True)
    broken = failed(record)
    for line in broken:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if broken else 0
