"""The results of a run: one JSON file (docs/benchmarks.md tells its fields), and what reports ask of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import files

from .ceilings import Ceilings
from .environment import environment
from .ops.cases import Case
from .ops.peers import EAGER

SCHEMA = 3
FOLDER = Path(__file__).parent / "results"
WIDTH = 120  # of a line of a file

# --- files ---


def record(**found: Any) -> dict[str, Any]:
    """What a command found, with the day and the machine."""
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "environment": environment("cpu"), **found}


def committed(name: str) -> dict[str, Any]:
    """The committed results of a command on a CPU."""
    found: dict[str, Any] = files.read_json(FOLDER / f"cpu/{name}.json")
    return found


def short(value: float) -> float | None:
    """Four digits, which is more than a clock repeats; None for what JSON cannot hold."""
    return _digits(value) if math.isfinite(value) else None


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Write JSON, numbers as ``short`` ones; whoever is cut off leaves the older file."""
    shortened = json.loads(json.dumps(found), parse_float=lambda text: _digits(float(text)))
    files.write_text(path, _text(shortened) + "\n")


def _text(value: Any, indent: int = 0) -> str:
    """JSON whose lines are filled; a list of numbers stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    numbers = isinstance(value, list) and all(isinstance(each, (int, float, type(None))) for each in value)
    if not isinstance(value, (dict, list)) or numbers or len(line) + indent <= WIDTH:
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_text(each, indent + 1)}" for key, each in value.items()]
    else:
        parts = [_text(each, indent + 1) for each in value]
    lines: list[str] = []
    for part in parts:
        fits = bool(lines) and "\n" not in lines[-1] + part and len(lines[-1] + part) + indent + 4 <= WIDTH
        lines[-1:] = [f"{lines[-1]}, {part}"] if fits else [*lines[-1:], part]
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return opened + f",\n{' ' * (indent + 1)}".join(lines) + closed


# --- a run of all cases ---

Rounds = dict[str, list[float]]  # phase -> seconds of every round


def paired(ways: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, Rounds]:
    """What each way gives in so many rounds, in each of which everyone has a turn."""
    found: dict[str, Rounds] = {name: {} for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            for part, value in way().items():
                found[name].setdefault(part, []).append(_digits(value))
    return found


@dataclass
class Row:
    """What was found about one implementation in one case.

    status: "ok", "failed" (its numbers break the rule: it gets no time) or "unavailable"; reason says why.
    errors: name of a result -> its error against float64; None where it is not finite.
    seconds: phase -> shortest round, quartiles (the second is the median).
    ratio: phase -> how many times as long as ours it takes, the median over the rounds of their time by ours in the same.
    first: phase -> median and ratio of the first calls of turns, where a turn of someone makes several (turns.py).
    calls: "inference" or "forward+backward" -> how many a turn makes, where these are several.
    rounds, firsts: all seconds, while they are measured.
    """

    peer: str
    kind: str = "peer"
    package: str = "torch"
    status: str = "ok"
    reason: str = ""
    backend: str = ""
    errors: dict[str, float | None] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    rounds: Rounds = field(default_factory=dict)
    firsts: Rounds = field(default_factory=dict)

    def median(self, phase: str, first: bool = False) -> float | None:
        """Median seconds, or None where it has no time; ``first``: of the first calls of turns."""
        if first and phase in self.first:
            return self.first[phase][0]
        return self.seconds[phase][2] if phase in self.seconds else None

    def over_ours(self, phase: str, first: bool = False) -> float | None:
        """How many times as long as ours it takes, or None where one of the two has no time."""
        return self.first[phase][1] if first and phase in self.first else self.ratio.get(phase)

    def shortest(self, phase: str) -> float | None:
        return self.seconds[phase][0] if phase in self.seconds else None

    def error(self, phase: str) -> float | None:
        """The largest error of what a phase computes: results forward, gradients backward, or both."""
        both = phase in ("forward+backward", "step")
        found = [
            value
            for name, value in self.errors.items()
            if both or name.startswith("d ") == (phase == "backward")
        ]
        return max((math.inf if value is None else value for value in found), default=None)


def settle(rows: Sequence[Row]) -> None:
    """Seconds, ratios and first calls of all rows of a case, from their rounds."""
    timed = [row for row in rows if row.status == "ok" and row.rounds]
    ours = next((row for row in timed if row.kind == "ours"), None)
    for row in timed:
        for phase, rounds in row.rounds.items():
            quartiles = statistics.quantiles(rounds, method="inclusive") if len(rounds) > 1 else rounds * 3
            row.seconds[phase] = [_digits(value) for value in (min(rounds), *quartiles)]
            if ours and phase in ours.rounds:
                row.ratio[phase] = _paired(rounds, ours.rounds[phase])
                if any(phase in other.firsts for other in timed):
                    # the only call of a turn is its first
                    found, own = (one.firsts.get(phase, one.rounds[phase]) for one in (row, ours))
                    row.first[phase] = [_digits(statistics.median(found)), _paired(found, own)]
        row.calls = {mode: calls for mode, calls in row.calls.items() if calls > 1}


def _paired(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return _digits(statistics.median(a / max(b, 1e-9) for a, b in zip(theirs, ours, strict=False)))


@dataclass
class Measured:
    """A case with its rows; load and noise (noise.py) before and after, and which commit was measured when.

    ceilings: of the machine when the case was added to a run that was done; None: those of the run.
    """

    case: Case
    rows: list[Row]
    load: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    took: float = 0.0
    measured: str = ""
    commit: str = ""
    ceilings: Ceilings | None = None

    @property
    def phase(self) -> str:
        """That a headline shows: the whole step where it is one, else forward+backward."""
        return "step" if self.case.op == "grpo_step" else "forward+backward"

    @property
    def title(self) -> str:
        """ "token_logprobs, N 2048, V 32768, float32" """
        case = self.case
        return ", ".join(filter(None, (case.op, case.shape, case.dtype, case.layout, case.model)))

    @property
    def ours(self) -> list[Row]:
        """Our rows, the one that stands for the op first."""
        return [row for row in self.rows if row.kind == "ours"]

    def named(self, peer: str) -> Row | None:
        return next((row for row in self.rows if row.peer == peer), None)

    @property
    def eager(self) -> Row | None:
        return self.named(EAGER)

    def best(self, phase: str, first: bool = False) -> Row | None:
        """The fastest implementation of someone else that gives right results."""
        timed = [row for row in self.rows if row.kind == "peer" and row.median(phase)]
        return min(timed, key=lambda row: row.median(phase, first) or math.inf, default=None)


@dataclass
class Run:
    """All cases of a run, and those without numbers with the reason."""

    environment: dict[str, Any]
    ceilings: Ceilings
    date: str = ""
    quick: bool = False
    cases: list[Measured] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return str(self.environment.get("gpu", self.environment["processor"]))

    @property
    def machine(self) -> str:
        return f"{self.device}, {self.environment['threads']} threads"

    @property
    def served(self) -> str:
        """The machine and what of the package serves it: one name of a processor stands for several instruction sets."""
        return f"{self.machine} (extension {self.environment['extension']})"

    @property
    def commits(self) -> str:
        """Of what was measured, in order of first use: several where a run was made in parts."""
        return ", ".join(dict.fromkeys(one.commit for one in self.cases)) or str(self.environment["commit"])

    def one_per_op(self) -> list[Measured]:
        """Of each op the case that stands for it: float32 at the shape of a model, else of a quick run, else the first."""

        def rank(one: Measured) -> tuple[bool, ...]:
            case = one.case
            model = case.model and "decode" not in case.model and "scaled" not in case.model
            return case.dtype != "float32", not model, not case.quick

        every = dict.fromkeys(one.case.op for one in self.cases)
        return [min((one for one in self.cases if one.case.op == op), key=rank) for op in every]

    def floors(self, one: Measured) -> dict[str, tuple[float, str]]:
        """Phase -> (seconds, bound) of a case, by the ceilings that were measured with it."""
        return (one.ceilings or self.ceilings).floors(one.case)

    def has(self, case: Case) -> bool:
        return case.id in {one.case.id for one in self.cases}

    def put(self, measured: Measured) -> None:
        """Add a case in place of any older entry of the same."""
        self.leave_out(measured.case, "")
        self.cases.append(measured)

    def go_on(self, before: Run, done: bool) -> None:
        """Take over what an earlier part of the run found, or a run that is done: of that nothing changes."""
        if done:
            self.environment, self.date = before.environment, before.date
            self.ceilings, self.quick = before.ceilings, before.quick
        else:
            self.ceilings, self.quick = self.ceilings.best(before.ceilings), self.quick or before.quick
        self.not_run |= before.not_run
        for kept in before.cases:
            self.put(kept)

    def leave_out(self, case: Case, reason: str) -> None:
        """Say why a case is not run; "": it is."""
        # both kinds of device have some shapes
        name = case.id if case.device == self.environment["device"] else f"{case.id} on {case.device}"
        self.cases = [one for one in self.cases if (one.case.id, one.case.device) != (case.id, case.device)]
        self.not_run.pop(name, None)
        if reason:
            self.not_run[name] = reason

    def save(self, path: Path) -> None:
        """As JSON; what a case or a row has by default is left out."""
        found = {"schema": SCHEMA, **asdict(self)}
        for measured in found["cases"]:
            measured["case"] = _unusual(measured["case"], Case)
            rows = [row | {"rounds": {}, "firsts": {}} for row in measured["rows"]]
            measured["rows"] = [_unusual(row, Row) for row in rows]
            if not measured["ceilings"]:
                del measured["ceilings"]
        save(path, found)


def _unusual(values: dict[str, Any], of: type[Case] | type[Row]) -> dict[str, Any]:
    """The values that are not the defaults of their class."""
    usual = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(of)
    }
    return {name: value for name, value in values.items() if value != usual[name]}


def load(path: Path) -> Run:
    """Read the results of a run.

    Raises:
        ValueError: the file is of another schema.
    """
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if found.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path}: expected benchmark results of schema {SCHEMA}")
    cases = []
    for one in found.pop("cases"):
        one |= {"case": Case(**one["case"]), "rows": [Row(**row) for row in one["rows"]]}
        own = one.pop("ceilings", None)
        cases.append(Measured(**one, ceilings=Ceilings(**own) if own else None))
    return Run(ceilings=Ceilings(**found.pop("ceilings")), cases=cases, **found)
