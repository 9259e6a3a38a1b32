"""Measure cases one after another, keep what is done, and report."""

import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from . import ceilings, measure, noise, report, results, step
from .environment import environment
from .ops.cases import CASES, Case, tiny
from .ops.families import FAMILIES
from .ops.peers import Unavailable
from .results import Measured, Row, Run

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
        named = {op: {op} for ops in FAMILIES.values() for op in ops} | FAMILIES
        if unknown := ", ".join(sorted(set(self.only) - named.keys())):
            raise SystemExit(f"--only: expected names out of {', '.join(sorted(named))}, got {unknown}")
        wanted = {op for name in self.only or FAMILIES for op in named[name]}
        run, left = [], []
        for case in tiny(self.device) if self.tiny else CASES:
            if case.op not in wanted:
                continue
            if case.device != self.device:
                left.append((case, OTHER_DEVICE[self.device]))
            elif self.quick and not case.quick:
                left.append((case, "left out of a quick run"))
            else:
                run.append(case)
        return sorted(run, key=lambda case: not case.quick), left


def run(plan: Plan, out: Path) -> Run:
    """Measure, write ``out`` after every case, and return the results."""
    began = time.monotonic()
    todo, left = plan.cases()
    before = results.load(out) if (plan.add or plan.resume) and out.is_file() else None
    if plan.resume and before:
        todo = [case for case in todo if not before.has(case)]
    print("the ceilings of this machine: copy, GEMM, exp", flush=True)
    device = torch.device(plan.device)
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    found = Run(environment(plan.device), ceilings.measure(device), today, plan.quick or plan.tiny)
    if before and before.served != found.served:
        raise SystemExit(f"{out} holds results of {before.served}, but this is {found.served}")
    commit, own = found.environment["commit"], found.ceilings if before and plan.add else None
    for case, reason in left:
        found.leave_out(case, reason)
    if before:
        found.go_on(before, done=plan.add)
    seconds = 0.0 if plan.tiny else measure.seconds_of(plan.device, plan.quick)
    for number, case in enumerate(todo, start=1):
        elapsed = time.monotonic() - began
        if elapsed > plan.limit:
            if not found.has(case):
                found.leave_out(case, OUT_OF_TIME)
            continue
        print(f"[{number}/{len(todo)}] {case.id} ({elapsed:.0f} s)", flush=True)
        load, spread = measure.load_average(), noise.of_machine(device)
        try:
            measured = Measured(
                case, rows(case, seconds, not plan.tiny, plan.ours, found.ceilings.of_torch(case))
            )
        except Unavailable as reason:
            found.leave_out(case, str(reason))
            print(f"  not run: {reason}", flush=True)
        except Exception as problem:
            # one case must not take the others with it
            traceback.print_exc()
            found.leave_out(case, f"{STOPPED}: {measure.first_line(problem)}")
        else:
            measured.load = [load, measure.load_average()]
            measured.noise = [spread, noise.of_machine(device)]
            measured.took = round(time.monotonic() - began - elapsed, 1)
            measured.measured = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
            measured.commit, measured.ceilings = commit, own
            found.put(measured)
            for row in (row for row in measured.rows if row.status == "failed"):
                print(f"  FAILED {row.peer}: {row.reason}", flush=True)
        measure.release()
        found.save(out)
    order = {case.id: position for position, case in enumerate(CASES) if case.device == plan.device}
    found.cases.sort(key=lambda one: order.get(one.case.id, 0))
    found.save(out)
    return found


def rows(
    case: Case, seconds: float, compiles: bool = True, ours: bool = False, of_torch: float = 0.0
) -> list[Row]:
    """What is measured about a case; as ``measure.measure``."""
    if case.op == "grpo_step":
        return step.measure(case, seconds)
    return measure.measure(case, seconds, compiles, ours, of_torch)


def failed(run: Run) -> list[str]:
    """Our rows that failed, and cases that stopped with an error: a run with any ends with an error."""
    stopped = [f"{name}: {reason}" for name, reason in run.not_run.items() if reason.startswith(STOPPED)]
    return report.failures(run) + stopped


def main(
    only: Sequence[str] = (),
    device: Literal["cpu", "cuda"] | None = None,
    quick: bool = False,
    tiny: bool = False,
    limit: float = math.inf,
    add: bool = False,
    resume: bool = False,
    ours: bool = False,
    out: Path | None = None,
) -> int:
    """1 if a kernel of ours failed, else 0. The device is a GPU where there is one, the file bench-results/DEVICE.json."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected cpu, got cuda on a machine without a CUDA device")
    out = out or Path(f"bench-results/{device}.json")
    plan = Plan(device, only, quick, tiny, limit, add, resume, ours)
    found = run(plan, out)
    late = list(found.not_run.values()).count(OUT_OF_TIME)
    print(f"{out}: {len(found.cases)} cases", flush=True)
    if late:
        print(f"no time was left for {late} cases: the same command with --resume runs them", flush=True)
    for line in failed(found):
        print(f"FAILED {line}", file=sys.stderr)
    report.main(out)
    return 1 if failed(found) else 0
