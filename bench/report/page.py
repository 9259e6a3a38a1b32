"""The report as one HTML page that needs nothing else, in the style of the trainer's report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import training.report

from .. import compare, results, saved
from . import pictures, tables
from .table import Table, times

STYLE = Path(training.report.__file__).with_name("style.css")
MORE_STYLE = """
body { max-width: 1440px; } td, thead th { padding-left: 7px; padding-right: 7px; }
h2 { margin-top: 40px; } h3 { margin: 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; margin-top: 14px; } nav a, summary { color: var(--accent); }
table.text th { text-align: left; }
td, thead th { text-align: right; } td.first, th.first { text-align: left; }
tbody td.first { font-weight: 600; white-space: normal; min-width: 130px; }
table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
td.failed, li.failed { color: var(--bad); font-weight: 600; } td.failed[colspan], td.muted[colspan] { white-space: normal; text-align: left; }
td.best { color: var(--good); font-weight: 600; } td.ours { color: var(--accent); font-weight: 600; } td.muted { color: var(--muted); }
.note { color: var(--muted); font-size: 13px; margin: 2px 0 0; max-width: 110ch; }
.warning { border-left: 4px solid var(--bad); padding-left: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); } .tile b { font-size: 20px; } .tile.lost b { color: var(--bad); }
details { border-top: 1px solid var(--line); margin: 0; padding: 10px 0; } summary { font-size: 14px; }
summary b { color: var(--ink); font-weight: 600; } summary span { color: var(--muted); margin-left: 8px; }
.bars { max-width: 860px; margin: 10px 0 4px; } .bar { grid-template-columns: 230px 1fr 84px; }
.bar.wide-label { grid-template-columns: minmax(0, 440px) minmax(80px, 1fr) 130px; } .bars small { display: block; }
svg + small { display: block; } .speed svg { max-width: 620px; }
svg { max-width: 860px; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--muted); } svg .grid { stroke: var(--line); }
@media (max-width: 1439px) { td, thead th { font-size: 12.5px; padding-left: 4px; padding-right: 4px; } }
@media (max-width: 700px) {
  body { padding: 24px 14px 60px; } h1 { font-size: 25px; }
  .bar { grid-template-columns: minmax(0, 1fr) 84px; row-gap: 2px; } .bar.wide-label { grid-template-columns: minmax(0, 1fr) 110px; }
  .bar i { grid-column: 1 / -1; grid-row: 2; } .bar span { white-space: normal; }
  svg text { font-size: 17px; }
  td, thead th { font-size: 12px; padding: 5px; } tbody td.first { min-width: 90px; } td:nth-child(2) { white-space: normal; min-width: 100px; }
}
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
        _tiles(record),
        _failures(record),
        _section("Others beside ours", _SPEED, _speed(record)),
        _section("How far from the floor", _FLOOR, pictures.floor_shares(record)),
        _section("Roofline", _ROOFLINE, pictures.roofline(record)),
        _table(tables.headline(record)),
        _list("Where we are not the best", tables.not_best(record)),
        _list("Cases whose rounds do not repeat", tables.noisy(record)),
        _table(tables.inference(record)),
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


_SPEED = "One case per op, forward and backward or the whole step: above 1x we are faster."
_FLOOR = (
    "The floor is the largest of bytes / copy bandwidth, FLOPs / GEMM rate and exponentials / exp rate, each input read "
    "once and each output written once, with the three ceilings measured in the same run. A product of ours that is faster "
    "than torch's, with which the ceiling is measured, passes 100 %, and so does a read from the caches."
)
_ROOFLINE = "Ops that multiply matrices, under the bandwidth and the GEMM rate of this machine."


def _head(record: Mapping[str, Any], title: str) -> str:
    made = record["environment"]
    facts = (
        f"{record['date']}, commit {tables.commits(record)}, torch {made['packages']['torch']}, "
        f"{made['threads']} threads, {tables.load(record)}"
        f"{', a quick run' if record['quick'] else ''}"
    )
    warnings = ["" if made["device"] == "cuda" else tables.NOT_ON_A_GPU, tables.noise_warning(record)]
    shown = "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings if text)
    links = "".join(f'<a href="#{op}">{op}</a>' for op, _ in tables.by_op(record["cases"]))
    return f'<header><h1>{escape(title)}</h1><p class="lead">{escape(facts)}</p>{shown}<nav>{links}</nav></header>'


def _tiles(record: Mapping[str, Any]) -> str:
    """One number an op: how many times longer the best of the others takes, from the worst of its cases to the best."""
    tiles = []
    for op, cases in tables.by_op(record["cases"]):
        ratios = sorted(filter(None, map(tables.best_ratio, cases)))
        if ratios:
            lost = " lost" if ratios[0] < 1 else ""
            ends = dict.fromkeys((times(ratios[0]), times(ratios[-1])))
            tiles.append(f'<div class="tile{lost}"><b>{" to ".join(ends)}</b><span>{op}</span></div>')
    note = "The best of the others by ours, forward and backward or the whole step, over the cases: above 1 we are faster."
    return f'<div class="tiles">{"".join(tiles)}</div><p class="note">{note}</p>' if tiles else ""


def _speed(record: Mapping[str, Any]) -> str:
    from .. import pictures as drawn  # which needs matplotlib

    numbers = {op: each for op, each in drawn.speed(record).items() if "best" in each}
    if not numbers:
        return ""
    # inside of HTML an SVG needs no names of namespaces
    picture = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawn.svg(drawn.draw_speed, numbers))
    return f'<div class="speed">{picture}</div>'


def _failures(record: Mapping[str, Any]) -> str:
    lines = tables.failures(record)
    items = "".join(f'<li class="failed">{escape(line)}</li>' for line in lines)
    text = "Results that break the numeric rule get no time: at most twice the error of eager PyTorch plus a few roundings."
    return _section("FAILED", text, f"<ul>{items}</ul>") if lines else ""


def _op(op: str, cases: Sequence[Mapping[str, Any]]) -> str:
    """Every case folds; the first of an op is open."""
    parts = []
    for number, case in enumerate(cases):
        table = tables.case_table(case)
        failed = [row["peer"] for row in case["rows"] if row["status"] == "failed"]
        ratio = tables.best_ratio(case)
        verdict = f"the best of the others takes {times(ratio)} our time" if ratio else ""
        verdict = "; ".join(filter(None, (f"FAILED: {', '.join(failed)}" if failed else "", verdict)))
        parts.append(
            f"<details{'' if number else ' open'}><summary><b>{escape(table.title)}</b><span>{verdict}</span></summary>"
            f'<p class="note">{escape(table.note)}</p>{pictures.bars(case)}{_cells(table)}</details>'
        )
    return f'<div id="{op}">{_section(op, "", "".join(parts))}</div>'


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
