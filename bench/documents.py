"""Writes the tables and pictures of README and docs from committed results; tables stand between marks.

    <!-- bench: headline -->
    ...
    <!-- end -->

``python -m bench documents`` writes them; a test holds them against the results.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from . import pictures, report, results
from .gpu import roofline
from .results import committed
from .studies import pipeline, precision, smollm2
from .table import Table

ROOT = Path(__file__).parents[1]
PAGES = "benchmarks logprob shared-prefix mixtures training distillation divergence gpu scaling learning"
FILES = (ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in PAGES.split()))
_BLOCK = re.compile(r"(<!-- bench: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _run() -> results.Run:
    return results.load(results.FOLDER / "cpu/ops.json")


def shown(*tables: Table, level: int = 0) -> str:
    return "\n\n".join(table.markdown(level) for table in tables)


def every_case() -> str:
    """The headline table of all cases."""
    run = _run()
    parts = [report.summary(run), report.headline(run).markdown(), f"**{report.NOT_ON_A_GPU}**"]
    lists = {"Where we are not the best": report.not_best, "Cases whose rounds do not repeat": report.noisy}
    for title, make in lists.items():
        if lines := make(run):
            parts.append(f"{title}:\n\n{shown(Table(title, (), lines))}")
    return "\n\n".join(parts)


def of_study(name: str) -> str:
    """The tables of a study, from its committed results."""
    return shown(*importlib.import_module(f"bench.studies.{name}").tables(committed(name)))


def errors(of_divergences: bool) -> str:
    """The tables of ``python -m bench precision``, of divergences or of log-probs."""
    tables = precision.tables(committed("precision"))
    chosen = (one for one in tables if one.title.startswith("linear_divergence") == of_divergences)
    return shown(*chosen, level=3)


def divergences() -> str:
    """Times, errors and memory of everyone, case by case."""
    run = _run()
    cases = (one for one in run.cases if one.case.op == "linear_divergence")
    return shown(*(report.case_table(run, one) for one in cases), level=3)


STUDIES = "saved prefix training_memory mixtures suite rollout truncation ranks"
BLOCKS: Mapping[str, Callable[[], str]] = {
    "ops": lambda: shown(report.ops(_run())),
    "every case": every_case,
    "inference": lambda: shown(report.inference(_run())),
    "floors": lambda: shown(report.floors(_run())),
    "roofline": lambda: shown(roofline.table()),
    "precision": partial(errors, False),
    "precision of divergences": partial(errors, True),
    "divergences": divergences,
    "pipeline": lambda: shown(*pipeline.tables(committed("tiny"))),
    "levels": lambda: shown(pipeline.levels(committed("tiny"))),
    "methods": lambda: shown(pipeline.methods(committed("tiny"))),
    "controls": lambda: shown(pipeline.controls(committed("tiny"), committed("tiny-controls"))),
    **{name: partial(of_study, name) for name in STUDIES.split()},
    "smollm2": lambda: f"{smollm2.sentence('zero')}.",
    "smollm2 marks": lambda: shown(smollm2.marks_table(smollm2.load("zero"))),
    "smollm2 operators": lambda: smollm2.operators("zero"),
    "smollm2 language reward": lambda: f"{smollm2.language_reward()}.",
    "smollm2 cold start": lambda: f"{smollm2.cold_start()}.",
    "smollm2 language operators": lambda: f"{smollm2.no_more_right()}.",
    "smollm2 language marks": lambda: shown(smollm2.marks_table(smollm2.load("languages"))),
    "smollm2 students": lambda: shown(smollm2.students_table(smollm2.load("student"), smollm2.load("zero"))),
    "smollm2 time": lambda: f"On one CPU core it takes {smollm2.times(smollm2.metrics('zero', 'zero'))}.",
}


def filled(text: str) -> str:
    """A document with what stands between its marks made again.

    Raises:
        KeyError: a mark names no block.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def main() -> None:
    """The command."""
    for path in FILES:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))
    for path in pictures.write(ROOT):
        print(path.relative_to(ROOT))
