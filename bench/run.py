"""``python -m bench run``: measure cases one after another and keep what is done."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import ceilings, noise, results, step
from .cases import CASES, FAMILIES, Case, tiny
from .environment import environment
from .measure import Effort, Row, first_line, load_average, measure, release
from .peers import Unavailable

OUT_OF_TIME = "no time was left"
STOPPED = "stopped with an error"
OTHER_DEVICE = {
    "cpu": "needs a CUDA device: not measured on this one",
    "cuda": "a shape for the CPU: not run on a GPU",
}


@dataclass(frozen=True)
class Plan:
    """What to run. only: names of families or ops. quick: fewer shapes and rounds. tiny: every op at a tiny shape.

    limit: seconds after which no further case is begun. add: keep the other cases that the file holds already.
    resume: keep all of them, and run those that it lacks. ours: no peers.
    """

    device: str
    only: Sequence[str] = ()
    quick: bool = False
    tiny: bool = False
    limit: float = math.inf
    add: bool = False
    resume: bool = False
    ours: bool = False

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
    before = results.load(out) if (plan.add or plan.resume) and out.is_file() else None
    if plan.resume and before:
        finished = {case["id"] for case in before["cases"]}
        todo = [case for case in todo if case.id not in finished]
    say("the ceilings of this machine: copy, GEMM, exp")
    device = torch.device(plan.device)
    found = ceilings.measure(device)
    if before:
        found = found.best(ceilings.Ceilings(**before["ceilings"]))
    record = begin(plan.device, plan.quick or plan.tiny, found, left)
    if before:
        _keep(record, before, found)
    effort = Effort(0.0) if plan.tiny else Effort.of(plan.device, plan.quick)
    for number, case in enumerate(todo, start=1):
        elapsed = time.monotonic() - began
        if elapsed > plan.limit:
            if case.id not in {kept["id"] for kept in record["cases"]}:
                _put(record, "not_run", _left_out(case, OUT_OF_TIME))
            continue
        say(f"[{number}/{len(todo)}] {case.id} ({elapsed:.0f} s)")
        load, spread = load_average(), noise.of_machine(device)
        try:
            found_rows = rows(case, effort, say, not plan.tiny, plan.ours)
        except Unavailable as reason:
            _put(record, "not_run", _left_out(case, str(reason)))
            say(f"  not run: {reason}")
        except Exception as problem:
            # one case must not take the others with it
            traceback.print_exc()
            _put(record, "not_run", _left_out(case, f"{STOPPED}: {first_line(problem)}"))
        else:
            done = results.case_record(case, found_rows, found, (load, load_average()))
            done["noise"] = [round(spread, 3), round(noise.of_machine(device), 3)]
            done["seconds"] = round(time.monotonic() - began - elapsed, 1)
            done["measured"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
            done["commit"] = record["environment"]["commit"]
            _put(record, "cases", done)
            _say_failures(found_rows, say)
        release()
        results.save(out, record)
    order = {case.id: position for position, case in enumerate(CASES) if case.device == plan.device}
    record["cases"].sort(key=lambda case: order.get(case["id"], 0))
    results.save(out, record)
    return record


def _keep(record: dict[str, Any], before: dict[str, Any], found: ceilings.Ceilings) -> None:
    """Take over what an older run holds, each case with its own load and commit, under the ceilings of both."""
    record["quick"] = record["quick"] or before["quick"]
    for case in before["cases"]:
        results.set_floors(case, found)
        _put(record, "cases", case)
    known = {_key(record, entry) for kind in ("cases", "not_run") for entry in record[kind]}
    record["not_run"] += [entry for entry in before["not_run"] if _key(record, entry) not in known]


def _put(record: dict[str, Any], kind: str, entry: dict[str, Any]) -> None:
    """Add an entry to "cases" or "not_run" in place of any older one of the same case."""
    key = _key(record, entry)
    for other in ("cases", "not_run"):
        record[other] = [old for old in record[other] if _key(record, old) != key]
    record[kind].append(entry)


def _key(record: dict[str, Any], entry: dict[str, Any]) -> tuple[str, str]:
    """Both kinds of device have some shapes; what was measured was measured on this one."""
    return entry["id"], entry.get("device", record["environment"]["device"])


def begin(
    device: str, quick: bool, found: ceilings.Ceilings, left: Sequence[tuple[Case, str]]
) -> dict[str, Any]:
    """The record of a run before its first case."""
    return {
        "schema": results.SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": quick,
        "environment": environment(device),
        "ceilings": asdict(found),
        "cases": [],
        "not_run": [_left_out(case, reason) for case, reason in left],
    }


def rows(
    case: Case, effort: Effort, say: Callable[[str], None], compiles: bool = True, ours: bool = False
) -> list[Row]:
    """What is measured about a case; ``compiles`` and ``ours`` as in ``measure``.

    Raises:
        Unavailable: the case does not fit the memory of the machine.
    """
    if case.op == "grpo_step":
        return step.measure(case, effort, say)
    return measure(case, effort, compiles, say, ours)


def _say_failures(rows: list[Row], say: Callable[[str], None]) -> None:
    for row in rows:
        if row.status == "failed":
            say(f"  FAILED {row.peer}: {row.reason}")


def _left_out(case: Case, reason: str) -> dict[str, Any]:
    return {"id": case.id, "op": case.op, "family": case.family, "device": case.device, "reason": reason}


def failed(record: dict[str, Any]) -> list[str]:
    """Our rows that failed, and cases that stopped with an error: a run with any ends with an error."""
    rows = [
        f"{case['id']}: {row['reason']}"
        for case in record["cases"]
        for row in case["rows"]
        if row["status"] == "failed" and row["kind"] == "ours"
    ]
    stopped = [entry for entry in record["not_run"] if entry["reason"].startswith(STOPPED)]
    return rows + [f"{entry['id']}: {entry['reason']}" for entry in stopped]


def main(plan: Plan, out: Path) -> int:
    """The command: 1 if a kernel of ours failed, else 0."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected cpu, got cuda on a machine without a CUDA device")
    record = run(plan, out, lambda text: print(text, flush=True))
    late = [entry for entry in record["not_run"] if entry["reason"] == OUT_OF_TIME]
    print(f"{out}: {len(record['cases'])} cases", flush=True)
    if late:
        print(f"no time was left for {len(late)} cases: the same command with --resume runs them", flush=True)
    broken = failed(record)
    for line in broken:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if broken else 0
