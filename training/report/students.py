"""The students of the distillation: how each of them learnt, and the methods side by side at equal tokens."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from training.format import percent
from training.report.marks import marks_of, number
from training.run_dir import RunDir
from training.sections import Student

# of a student in the metrics of the stage
KEYS = ("method", "learnt", "steps", "loss", "accuracy", "parameters")


class Learnt(NamedTuple):
    """What became of a student."""

    name: str
    method: str
    beginning: str
    epochs: int  # of the teacher's responses, whose tokens were learnt; 0: it was told its steps
    tokens: int
    steps: int
    seconds: float
    loss: float
    accuracy: float | None
    low: float | None  # the 95 % interval of the accuracy, where evaluate has measured it
    high: float | None


def learnt(run_dir: RunDir) -> list[Learnt]:
    """All students of a finished distillation, in the order of the recipe."""
    record = run_dir.stage("distill").record()
    metrics: Mapping[str, Any] = record["metrics"] if record is not None else {}
    marks, sizes = marks_of(run_dir), run_dir.read_recipe().distill.students
    found = []
    for name in (key.removesuffix("/method") for key in metrics if key.endswith("/method")):
        of = {key: metrics[f"{name}/{key}"] for key in KEYS}
        rows = [row for row in run_dir.stage("distill").metrics() if row.get("part") == name]
        mark = marks.get(f"distill-{name}", of)
        interval = (number(mark.get(key)) for key in ("accuracy", "wilson_low", "wilson_high"))
        begun = beginning(sizes[name], of["parameters"])
        epochs = 0 if sizes[name].steps else sizes[name].epochs
        told = (of["method"], begun, epochs, of["learnt"], of["steps"], seconds(rows), of["loss"])
        found.append(Learnt(name, *told, *interval))
    return found


def seconds(rows: Iterable[Mapping[str, Any]]) -> float:
    """What the steps of a student took, sampling included, from the lines of metrics.jsonl."""
    return sum(row["tokens"] / row["tokens_per_second"] for row in rows)


def beginning(sizes: Student, parameters: int) -> str:
    """What a student begins with, in words."""
    return sizes.start or sizes.pretrained or f"{sizes.architecture} of {parameters:,} random weights"


def at_equal_tokens(students: Iterable[Learnt]) -> list[list[Learnt]]:
    """Those that begin alike and learn the tokens of as many epochs, by two methods at least."""
    groups: dict[tuple[str, int], list[Learnt]] = {}
    for each in students:
        if each.epochs:
            groups.setdefault((each.beginning, each.epochs), []).append(each)
    return [group for group in groups.values() if len({each.method for each in group}) > 1]


def tables(run_dir: RunDir) -> str:
    """Both tables as HTML; empty before the distillation is done."""
    students = learnt(run_dir)
    if not students:
        return ""
    every = _table(
        ("", "begins with", "learns from", "tokens", "steps", "loss", "accuracy"),
        (
            (each.name, each.beginning, each.method, f"{each.tokens:,}", f"{each.steps:,}", f"{each.loss:.3f}", _accuracy(each))
            for each in students
        ),
    )  # fmt: skip
    compared = [each for group in at_equal_tokens(students) for each in group]
    if not compared:
        return every
    equal = _table(
        ("", "begins with", "learns from", "tokens", "seconds", "accuracy"),
        (
            (each.name, each.beginning, each.method, f"{each.tokens:,}", f"{each.seconds:,.1f}", _accuracy(each))
            for each in compared
        ),
    )  # fmt: skip
    return f"{every}<h3>Methods at equal tokens</h3><p><small>{escape(_EQUAL)}</small></p>{equal}"


_EQUAL = (
    "Students that begin alike and learn as many tokens, to within those of a step. Seconds are those of learning, sampling on policy "
    "included; of several processes they are those of all side by side."
)


def _accuracy(student: Learnt) -> str:
    if student.accuracy is None:
        return "-"
    text = f"{percent(student.accuracy)} %"
    return text if student.low is None else f"{text} ({percent(student.low)} to {percent(student.high)})"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = (
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
