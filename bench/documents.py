"""The tables and pictures of README and docs that come from committed results; tables are written between marks.

    <!-- bench: headline -->
    ...
    <!-- end -->

``python -m bench documents`` writes them; a test holds them against the results.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from . import pictures, report, results
from .gpu import roofline
from .studies import pipeline, precision, smollm2
from .table import Table

ROOT = Path(__file__).parents[1]
PAGES = "benchmarks logprob shared-prefix mixtures training distillation divergence gpu scaling learning"
FILES = (ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in PAGES.split()))
_BLOCK = re.compile(r"(<!-- bench: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _run() -> results.Run:
    return results.load(results.FOLDER / "cpu/ops.json")


def every_case() -> str:
    """The headline table of all cases."""
    run = _run()
    parts = [report.summary(run), report.headline(run).markdown(), f"**{report.NOT_ON_A_GPU}**"]
    lists = {"Where we are not the best": report.not_best, "Cases whose rounds do not repeat": report.noisy}
    for title, make in lists.items():
        if lines := make(run):
            parts.append(f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def of_command(module: str, name: str) -> str:
    """The tables of a command, from its committed results."""
    tables: list[Table] = importlib.import_module(f"bench.studies.{module}").tables(results.committed(name))
    return "\n\n".join(table.markdown() for table in tables)


def of_tiny(make: Callable[[Mapping[str, Any]], Table]) -> str:
    """A table of the committed runs of `tiny`."""
    return make(results.committed("tiny")).markdown()


def controls() -> str:
    """R1-Zero of a committed run of `tiny` beside its controls."""
    return pipeline.controls(results.committed("tiny"), results.committed("tiny-controls")).markdown()


def errors(of_divergences: bool) -> str:
    """The tables of ``python -m bench precision``, of divergences or of log-probs."""
    tables = precision.tables(results.committed("precision"))
    shown = [table for table in tables if table.title.startswith("linear_divergence") == of_divergences]
    return "\n\n".join(table.markdown(3) for table in shown)


def divergences() -> str:
    """Times, errors and memory of everyone, case by case."""
    run = _run()
    cases = [one for one in run.cases if one.case.op == "linear_divergence"]
    return "\n\n".join(report.case_table(run, one).markdown(3) for one in cases)


COMMANDS = (
    "saved",
    "prefix",
    "training_memory",
    "mixtures",
    "suite",
    "rollout",
    "truncation",
    "distillation",
    "ranks",
)
BLOCKS: Mapping[str, Callable[[], str]] = {
    "ops": lambda: report.ops(_run()).markdown(),
    "every case": every_case,
    "inference": lambda: report.inference(_run()).markdown(),
    "floors": lambda: report.floors(_run()).markdown(),
    "roofline": lambda: roofline.table().markdown(),
    "precision": partial(errors, False),
    "precision of divergences": partial(errors, True),
    "divergences": divergences,
    "pipeline": partial(of_command, "pipeline", "tiny"),
    "levels": partial(of_tiny, pipeline.levels),
    "methods": partial(of_tiny, pipeline.methods),
    "controls": controls,
    **{name: partial(of_command, name, name) for name in COMMANDS},
    "smollm2": lambda: f"{smollm2.sentence('zero')}.",
    "smollm2 marks": lambda: smollm2.marks_table(smollm2.load("zero")).markdown(),
    "smollm2 operators": lambda: smollm2.operators("zero"),
    "smollm2 language reward": lambda: f"{smollm2.language_reward()}.",
    "smollm2 cold start": lambda: f"{smollm2.cold_start()}.",
    "smollm2 language operators": lambda: f"{smollm2.no_more_right()}.",
    "smollm2 language marks": lambda: smollm2.marks_table(smollm2.load("languages")).markdown(),
    "smollm2 students": lambda: smollm2.students_table(
        smollm2.load("student"), smollm2.load("zero")
    ).markdown(),
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
