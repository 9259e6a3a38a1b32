"""The report as Markdown, and its short form for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.format import align

from .. import compare, saved
from . import tables
from .table import Cell, Table


def document(
    record: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> str:
    """All tables of the page, without its pictures."""
    made = record["environment"]
    parts = [f"# Benchmarks on {made.get('gpu', made['processor'])}", summary(record)]
    if made["device"] != "cuda":
        parts.append(f"**{tables.NOT_ON_A_GPU}**")
    parts += _list("FAILED", [f"**{line}**" for line in tables.failures(record)])
    parts.append(section(tables.headline(record)))
    parts += _list("Where we are not the best", tables.not_best(record))
    parts += _list("Cases whose rounds do not repeat", tables.noisy(record))
    parts.append(section(tables.inference(record)))
    for op, cases in tables.by_op(record["cases"]):
        parts.append(f"## {op}")
        parts += [section(tables.case_table(case), level=3) for case in cases]
    if kept:
        parts.append(section(saved.table(kept)))
    if before:
        parts.append(section(compare.table(before, record)))
    parts += [section(table) for table in (tables.not_run(record), tables.environment(record)) if table.rows]
    return "\n\n".join(parts) + "\n"


def summary(record: Mapping[str, Any]) -> str:
    """One or two sentences: machine, versions, load; a warning where the machine was not quiet."""
    made = record["environment"]
    text = (
        f"{made.get('gpu', made['processor'])}, {made['threads']} threads, torch {made['packages']['torch']}, "
        f"{record['date']}, commit {tables.commits(record)}, {tables.load(record)}"
        f"{', a quick run' if record['quick'] else ''}."
    )
    warning = tables.noise_warning(record)
    return f"{text} **{warning}**" if warning else text


def section(table: Table, level: int = 2) -> str:
    """A heading, the note and the table."""
    return "\n\n".join(filter(None, (f"{'#' * level} {table.title}", table.note, rows(table))))


def rows(table: Table) -> str:
    """The table alone; what failed is bold, and so is what is best."""
    head = [name or " " for name in table.head]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)


def terminal(record: Mapping[str, Any]) -> str:
    """The headline in even columns, then failures and where we are not the best."""
    table = tables.headline(record)
    columns = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    shown = [[str(table.head[column]) for column in columns]]
    shown += [[row[column].text for column in columns] for row in table.rows]
    parts = [summary(record).replace("**", ""), *align(shown)]
    parts += [f"FAILED {line}" for line in tables.failures(record)]
    parts += [f"NOT THE BEST {line}" for line in tables.not_best(record)]
    parts += [f"NOISY {line}" for line in tables.noisy(record)]
    if record["environment"]["device"] != "cuda":
        parts.append(tables.NOT_ON_A_GPU)
    return "\n".join(parts)


def _text(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|")
    return f"**{text}**" if text and cell.mark in ("failed", "best") else text


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []
