"""The report as one HTML page that needs nothing else, in the style of the trainer's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import training.report

from .. import compare, results, saved
from . import pictures, tables
from .table import Table

STYLE = Path(training.report.__file__).with_name("style.css")
MORE_STYLE = """
body { max-width: 1420px; }
table.text th { text-align: left; }
td, thead th { text-align: right; } td.first, th.first { text-align: left; }
tbody td.first { font-weight: 600; white-space: normal; min-width: 150px; }
table.text td { text-align: left; white-space: normal; }
td.failed, li.failed { color: var(--bad); font-weight: 600; white-space: normal; text-align: left; }
td.best { color: var(--good); font-weight: 600; } td.ours { color: var(--accent); font-weight: 600; }
td.muted { color: var(--muted); white-space: normal; text-align: left; }
.note { color: var(--muted); font-size: 13px; margin: 2px 0 0; } .warning { border-left: 4px solid var(--bad); padding-left: 12px; }
.bars { max-width: 760px; margin: 10px 0 4px; } .bar { grid-template-columns: 230px 1fr 84px; }
.bar.wide-label { grid-template-columns: 420px 1fr 110px; } .bars small { display: block; }
svg + small { display: block; }
svg { max-width: 760px; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--muted); } svg .grid { stroke: var(--line); }
"""


def page(
    record: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> str:
    """The whole page; ``before`` are the results to show changes against, ``kept`` those of ``python -m bench saved``."""
    made = record["environment"]
    title = f"r1kernels: benchmarks on {made.get('gpu', made['processor'])}"
    sections = [
        _head(record, title),
        _failures(record),
        _table(tables.headline(record)),
        _list("Where we are not the best", tables.not_best(record)),
        _table(tables.inference(record)),
        _section("How far from the floor", _FLOOR, pictures.floor_shares(record)),
        _section("Roofline", _ROOFLINE, pictures.roofline(record)),
        *(_op(op, cases) for op, cases in tables.by_op(record["cases"])),
        _table(saved.table(kept), text=True) if kept else "",
        _changes(record, before),
        _table(tables.not_run(record), text=True),
        _table(tables.environment(record), text=True),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text(encoding='utf-8')}{MORE_STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )


_FLOOR = (
    "The floor is the largest of bytes / copy bandwidth, FLOPs / GEMM rate and exponentials / exp rate, each input read "
    "once and each output written once, with the three ceilings measured in the same run. 100 % can not be passed."
)
_ROOFLINE = "Ops that multiply matrices, under the bandwidth and the GEMM rate of this machine."


def _head(record: Mapping[str, Any], title: str) -> str:
    made = record["environment"]
    facts = (
        f"{record['date']}, commit {made['commit']}, torch {made['packages']['torch']}, {made['threads']} threads, "
        f"load {record['load_before']} to {record.get('load_after', '-')}"
        f"{', a quick run' if record['quick'] else ''}"
    )
    warning = "" if made["device"] == "cuda" else f'<p class="warning">{escape(tables.NOT_ON_A_GPU)}</p>'
    return f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(facts)}</p>{warning}</header>"


def _failures(record: Mapping[str, Any]) -> str:
    lines = tables.failures(record)
    items = "".join(f'<li class="failed">{escape(line)}</li>' for line in lines)
    text = "Results that break the numeric rule get no time: at most twice the error of eager PyTorch plus a few roundings."
    return _section("FAILED", text, f"<ul>{items}</ul>") if lines else ""


def _op(op: str, cases: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for case in cases:
        table = tables.case_table(case)
        parts.append(
            f"<h3>{escape(table.title)}</h3><p class='note'>{escape(table.note)}</p>"
            f"{pictures.bars(case)}{_cells(table)}"
        )
    return _section(op, "", "".join(parts))


def _changes(record: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    return _table(compare.table(before, record)) if before else ""


def _table(table: Table, text: bool = False) -> str:
    return _section(table.title, table.note, _cells(table, text)) if table.rows else ""


def _cells(table: Table, text: bool = False) -> str:
    head = "".join(
        f'<th class="{"first" if index == 0 else ""}">{escape(name)}</th>'
        for index, name in enumerate(table.head)
    )
    rows = []
    for row in table.rows:
        cells = []
        for index, cell in enumerate(row):
            span = ""
            if (
                cell.mark in ("failed", "muted")
                and index
                and all(not other.text for other in row[index + 1 :])
            ):
                span = f' colspan="{len(row) - index}"'
            classes = " ".join(filter(None, ("first" if index == 0 else "", cell.mark)))
            cells.append(f'<td class="{classes}"{span}>{escape(cell.text)}</td>')
            if span:
                break
        rows.append(f"<tr>{''.join(cells)}</tr>")
    kind = ' class="text"' if text else ""
    shown = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    return f'<div class="wide"><table{kind}>{shown}<tbody>{"".join(rows)}</tbody></table></div>'


def _list(title: str, lines: Sequence[str]) -> str:
    return (
        _section(title, "", f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")
        if lines
        else ""
    )


def _section(title: str, text: str, body: str) -> str:
    if not body:
        return ""
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(text)}</p>' if text else ''}{body}</section>"


def committed(record: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any] | None:
    """The last committed results of this name on the same kind of device, if there are any."""
    path = folder / record["environment"]["device"] / name
    return results.load(path) if path.is_file() else None
