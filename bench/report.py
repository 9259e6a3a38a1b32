"""The report of a run: the same sections as one HTML page, as Markdown beside it and, in short, for a terminal."""

import importlib.util
import re
from collections.abc import Iterator
from html import escape
from itertools import product
from pathlib import Path

import training.report
from training.format import duration

from . import noise
from .compare import changes
from .ops.peers import PHASES
from .results import FOLDER, Measured, Row, Run, committed, load
from .step import PARTS
from .studies import saved
from .table import MISSING, Cell, Table, milliseconds, rate, size, small, times
from .turns import SECONDS

NOT_ON_A_GPU = "Not measured on a GPU: these numbers are of a CPU. The shapes for GPUs are in the list of what was not run."
FIRST = (
    f"A call shorter than {milliseconds(SECONDS)} ms is made several times in a turn: times are those of the calls after the "
    "first, and the ratio of the first calls, right after other code ran and filled the caches, stands beside."
)
HEADLINE = ("op", "shape", "dtype", "ours, ms", "best of the others", "its ms", "others / ours", "first call", "eager / ours",
            "ours / floor", "our error", "its error")  # fmt: skip

# --- sentences ---


def summary(run: Run) -> str:
    """Machine, versions, load; a warning where the machine was not quiet."""
    made, loads = run.environment, [value for one in run.cases for value in one.load]
    spreads = [value for one in run.cases for value in one.noise]
    text = f"{run.machine}, torch {made['packages']['torch']}, {run.date}, commit {run.commits}"
    if loads:
        text += f", load average {min(loads):.1f} to {max(loads):.1f}, our own threads included"
    if spreads:
        text += f"; a fixed work between the cases repeats within {100 * (max(spreads) - 1):.0f} %"
    text += ", a quick run." if run.quick else "."
    if many := sum(value > noise.MACHINE_LIMIT for value in spreads):
        text += (
            f" **The machine was not quiet: {many} of {len(spreads)} times the median of a fixed work lay more than "
            f"{100 * (noise.MACHINE_LIMIT - 1):.0f} % above its shortest. Trust ratios more than times.**"
        )
    return text


def noisy(run: Run) -> list[str]:
    """A sentence for every case of which our rounds, or those of the best of the others, do not repeat."""
    lines = []
    for one in run.cases:
        for row in filter(None, (*one.ours[:1], one.best(one.phase))):
            shortest, median = row.shortest(one.phase), row.median(one.phase)
            if shortest and median and median / shortest > noise.ROUNDS_LIMIT:
                found = times(median / shortest)
                lines.append(f"{one.title}: the median of {row.peer} is {found} its shortest round.")
    return lines


def not_best(run: Run) -> list[str]:
    """A sentence for every case in which someone else is faster, with both beside the floor."""
    lines = []
    for one in run.cases:
        for phase, first in product(dict.fromkeys((one.phase, "inference")), (False, True)):
            peer, own = one.best(phase, first), one.ours[0] if one.ours else None
            ratio = peer.over_ours(phase, first) if peer and (not first or phase in peer.first) else None
            if not own or not peer or not ratio or ratio >= 1:
                continue
            text = f"{one.title}, {phase}{', first call' if first else ''}: {peer.peer} takes {times(ratio)} our time"
            if phase in (known := run.floors(one)):
                floor, bound = known[phase]
                ours, theirs = (times((row.median(phase, first) or 0) / (floor or 1)) for row in (own, peer))
                text += f"; ours takes {ours} the {bound} floor, theirs {theirs}"
            if bare := _over_bare(one, own):
                text += f"; ours over bare GEMMs: {bare}"
            lines.append(text + ".")
    return lines


def failures(run: Run) -> list[str]:
    """What of ours broke the numeric rule or raised; others that did stand in the tables of their cases."""
    ours = ((one.title, row) for one in run.cases for row in one.ours)
    return [f"{title}: {row.peer}: {row.reason}" for title, row in ours if row.status == "failed"]


# --- tables ---


def headline(run: Run) -> Table:
    """Forward and backward, or the whole step: ours against the best of the others, case by case."""
    note = (
        "Forward and backward together (of the trainer a whole step), median of the rounds; ratios are paired within "
        "a round: above 1 we are faster. Errors are the largest against float64, over results and gradients."
    )
    rows = [_against_the_best(run, one, one.phase) for one in run.cases if one.ours]
    return _headline("Headline", note, rows)


def inference(run: Run) -> Table:
    """The same for a forward without gradients, which two of the three passes of GRPO are."""
    note = (
        "One forward without gradients; peers that compute their gradients in the forward do not do so here."
    )
    shown = (one for one in run.cases if one.ours and one.phase != "step")
    return _headline("Inference", note, [_against_the_best(run, one, "inference") for one in shown])


def _headline(title: str, note: str, rows: list[list[str]]) -> Table:
    several = any(row[HEADLINE.index("first call")] != MISSING for row in rows)
    return Table(title, HEADLINE, rows, f"{note} {FIRST}" if several else note)


def _names(one: Measured) -> list[str]:
    return [one.case.op, ", ".join(filter(None, (one.case.shape, one.case.layout))), one.case.dtype]


def _against_the_best(run: Run, one: Measured, phase: str) -> list[str]:
    own, seconds = one.ours[0], one.ours[0].median(phase)
    if seconds is None:
        return [*_names(one), Cell(_state(own), "failed"), *[MISSING] * (len(HEADLINE) - 4)]
    floor = run.floors(one).get(phase)
    peer, at_first = one.best(phase), one.best(phase, first=True)
    ratio = peer.over_ours(phase) if peer else None
    first = at_first.over_ours(phase, first=True) if at_first and phase in at_first.first else None
    lost = ratio is not None and ratio < 1
    return [
        *_names(one),
        Cell(milliseconds(seconds), "ours"),
        peer.peer if peer else MISSING,
        milliseconds(peer.median(phase)) if peer else MISSING,
        Cell(times(ratio) + ", slower" * lost, "failed" if lost else "best") if peer else MISSING,
        times(first),
        times(one.eager.over_ours(phase)) if one.eager else MISSING,
        f"{times(seconds / floor[0])} {floor[1]}" if floor else MISSING,
        small(own.error(phase)),
        small(peer.error(phase)) if peer else MISSING,
    ]


def ops(run: Run) -> Table:
    """A row per op: ours, the best of the others, and the errors; few columns, and none that a narrow page breaks anywhere."""
    rows = []
    for one in (one for one in run.one_per_op() if one.ours):
        op, shape, _, ours, peer, _, ratio, *_, error, its = _against_the_best(run, one, one.phase)
        whole = shape.replace(" ", "\u00a0").replace(",\u00a0", ", ")
        rows.append([op, whole, ours, peer, ratio, *(each.replace("-", "\u2011") for each in (error, its))])
    head = ("op", "shape", "ours, ms", "best of the others", "others / ours", "our error", "its error")
    return Table("Summary", head, rows)


def floors(run: Run) -> Table:
    """How near our implementations come to what binds each phase, and what bare GEMMs take beside them."""
    note = (
        "Floor / median time, and which floor binds; in brackets, where exponentials do, the same against the floor of the "
        "bytes alone. A phase passes 100 % where a product of ours is faster than torch's, with which the ceiling is "
        "measured, where what it reads is in the caches still, or where an earlier phase has done its work: the GRPO losses "
        "make their gradients in the forward. / bare GEMMs: our forward and backward over the products alone, of the head "
        "three or, with logits recomputed, four; dense: without experts, of the same FLOPs. Peak memory includes results and "
        "gradients."
    )
    rows = []
    for one, row in ((case, row) for case in run.cases if case.phase != "step" for row in case.ours):
        shares = [_of_floor(run, one, row, phase) for phase in PHASES]
        last = [_over_bare(one, row) or "-", size(row.peak_bytes)]
        rows.append([*_names(one), Cell(row.peer, "ours"), *shares, *last])
    return Table(
        "Floors", ("op", "shape", "dtype", "ours", *PHASES, "/ bare GEMMs", "peak memory"), rows, note
    )


def _of_floor(run: Run, one: Measured, row: Row, phase: str) -> str:
    seconds = row.median(phase)
    if not seconds:
        return MISSING
    floor, bound = run.floors(one)[phase]
    text = f"{100 * floor / seconds:.0f} % {bound}"
    if bound == "exp":
        text += f" ({100 * one.case.work()[phase].bytes / (one.ceilings or run.ceilings).bytes_per_second / seconds:.0f} %)"
    return text


def _over_bare(one: Measured, row: Row) -> str:
    """ "1.05x three, 0.79x four" """
    own, bare = row.over_ours(one.phase), [other for other in one.rows if other.kind == "floor"]
    found = [(other.over_ours(one.phase), other.peer.split()[0]) for other in bare]
    return ", ".join(f"{times(own / its)} {name}" for its, name in found if own and its)


def case_table(run: Run, one: Measured) -> Table:
    """Every implementation of a case: times of each phase, ratio to ours, fraction of the floor, errors, memory."""
    phases, main = (*PARTS, "step") if one.phase == "step" else PHASES, one.phase
    several = any(main in row.first for row in one.rows)
    head = ["implementation", *(f"{phase}, ms" for phase in phases), *["first call, ms"] * several,
            "/ ours", "/ floor", "error", "gradient error", "peak memory", "saved"]  # fmt: skip
    found = run.floors(one)
    rows: list[list[str]] = []
    for row in one.rows:
        version = run.environment["packages"].get(row.package) if row.kind == "peer" else None
        label = f"{row.peer} ({version})" if version else row.peer
        label += f" [{row.backend}]" if row.kind == "ours" and row.backend else ""
        cells: list[str] = [Cell(label, {"ours": "ours", "floor": "muted"}.get(row.kind, ""))]
        rows.append(cells)
        if row.status != "ok":
            mark = "failed" if row.status == "failed" else "muted"
            cells += [Cell(_state(row), mark), *[""] * (len(head) - 2)]
            continue
        seconds = row.median(main)
        cells += [_time(one, row, phase) for phase in phases]
        cells += [milliseconds(row.first[main][0] if main in row.first else None)] * several
        cells += [times(row.over_ours(main)), times(seconds / found[main][0]) if seconds and found else "-"]
        cells += [small(row.error("forward")), small(row.error("backward"))]
        cells += [size(row.peak_bytes), size(row.saved_bytes)]
    note = "Median, in brackets the shortest round."
    if found:
        parts = ((phase, *found[phase]) for phase in ("forward", "backward"))
        note += f" Floor: {', '.join(f'{phase} {milliseconds(floor)} ms ({bound})' for phase, floor, bound in parts)}."
    if several:
        turns = (f"{row.peer} {row.calls[main]}" for row in one.rows if main in row.calls)
        note += f" Calls a turn, {main}: {', '.join(turns)}."
    return Table(one.title, head, rows, note, level=3)


def _time(one: Measured, row: Row, phase: str) -> str:
    """Median, with the shortest round in brackets; the fastest of the case stands out."""
    seconds = row.median(phase)
    if seconds is None:
        return MISSING
    others = [found for other in one.rows if other.kind != "floor" and (found := other.median(phase))]
    # forward and backward apart compare nothing: some compute their gradients in the forward
    best = phase in ("inference", one.phase) and row.kind != "floor" and seconds <= min(others, default=0.0)
    return Cell(f"{milliseconds(seconds)} ({milliseconds(row.shortest(phase))})", "best" if best else "")


def _state(row: Row) -> str:
    """ "FAILED: ..." or why a row is missing."""
    return ("FAILED: " if row.status == "failed" else "") + row.reason


def environment(run: Run) -> Table:
    """Machine, versions and the measured ceilings."""
    made, ceilings = run.environment, run.ceilings
    gemm = (f"{rate(value, 'FLOP/s')} {name}" for name, value in ceilings.flops_per_second.items())
    facts = {
        "device": run.device,
        "threads": str(made["threads"]),
        "measuring took": duration(sum(one.took for one in run.cases)),
        "Python": made["python"],
        "r1kernels": f"{made['r1kernels']}, extension {made['extension']}",
        **{name: found or "not installed" for name, found in made["packages"].items()},
        "copy": rate(ceilings.bytes_per_second, "B/s"),
        "GEMM": ", ".join(gemm),
        "exp": rate(ceilings.exps_per_second, "/s"),
    }
    if added := [one.title for one in run.cases if one.ceilings]:
        facts["added later, beside ceilings of their own"] = "; ".join(added)
    return Table("Environment", ("fact", "value"), list(facts.items()))


# --- the whole ---


def sections(run: Run, before: Run | None) -> Iterator[Table]:
    """What the report holds, pictures first; some may be empty."""
    yield Table("FAILED", (), failures(run))
    if importlib.util.find_spec("matplotlib"):
        from . import pictures

        speed, floor = pictures.speed(run), pictures.floors(run)
        yield Table("Time of others over ours", picture=pictures.svg(pictures.draw_speed, speed, (7, 5.5)))
        yield Table("How far from the floor", picture=pictures.svg(pictures.draw_floors, floor, (7, 7)))
    yield headline(run)
    yield Table("Where we are not the best", (), not_best(run))
    yield Table("Cases whose rounds do not repeat", (), noisy(run))
    yield inference(run)
    yield floors(run)
    for op in dict.fromkeys(one.case.op for one in run.cases):
        yield Table(op, note="Every implementation, case by case.")
        yield from (case_table(run, one) for one in run.cases if one.case.op == op)
    if run.environment["device"] == "cpu":
        yield saved.tables(committed("saved"))[0]
    if before:
        yield changes(before, run)
    yield Table("Not run", ("case", "reason"), list(run.not_run.items()))
    yield environment(run)


def _warnings(run: Run) -> list[str]:
    return [summary(run), *([] if run.environment["device"] == "cuda" else [f"**{NOT_ON_A_GPU}**"])]


def document(run: Run, before: Run | None = None) -> str:
    """The report as Markdown, without its pictures."""
    shown = (table for table in sections(run, before) if not table.empty and not table.picture)
    parts = [f"# Benchmarks on {run.device}", *_warnings(run), *(one.markdown(one.level) for one in shown)]
    return "\n\n".join(parts) + "\n"


STYLE = Path(training.report.__file__).with_name("style.css")
MORE_STYLE = """
body { max-width: 1440px; } details { border-top: 1px solid var(--line); padding: 8px 0; } summary { font-size: 14px; color: var(--accent); }
td, thead th { text-align: left; padding: 4px 6px; font-size: 12px; } td:nth-child(2), td:nth-child(5) { white-space: normal; min-width: 110px; }
td.failed, td.best, td.ours { font-weight: 600; } td.failed { color: var(--bad); } td.best { color: var(--good); } td.ours { color: var(--accent); }
td.muted { color: var(--muted); } .note { color: var(--muted); font-size: 13px; max-width: 110ch; }
svg { max-width: 860px; width: 100%; height: auto; }
@media (max-width: 700px) { body { padding: 24px 14px 60px; } h1 { font-size: 25px; } td, thead th { font-size: 12px; padding: 4px; } }
"""


def page(run: Run, before: Run | None = None) -> str:
    """The report as one HTML page that needs nothing else, in the style of the trainer's report."""
    title = escape(f"r1kernels: benchmarks on {run.device}")
    warned = (re.sub(r"\*\*(.*?)\*\*", r"<strong>\1</strong>", escape(text)) for text in _warnings(run))
    parts = [f"<h1>{title}</h1>", *(f"<p>{text}</p>" for text in warned)]
    for table in (table for table in sections(run, before) if not table.empty):
        name, shown = escape(table.title), table.html()
        folded = f"<details><summary>{name}</summary>{shown}</details>"
        parts.append(folded if table.level == 3 else f"<h2>{name}</h2>{shown}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text(encoding='utf-8')}{MORE_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def terminal(run: Run) -> str:
    """The headline, then failures and where we are not the best."""
    parts = [*_warnings(run), headline(run).markdown()]
    for label, lines in (("FAILED", failures(run)), ("NOT THE BEST", not_best(run)), ("NOISY", noisy(run))):
        parts += [f"{label} {line}" for line in lines]
    return "\n".join(parts)


def main(results: Path, against: Path | None = None) -> None:
    """Page and Markdown beside a file of results. against: older results; None: those committed of such a device, if any."""
    run = load(results)
    against = against or FOLDER / str(run.environment["device"]) / "ops.json"
    before = load(against) if against.is_file() else None
    html, markdown = results.with_suffix(".html"), results.with_suffix(".md")
    html.write_text(page(run, before), encoding="utf-8")
    markdown.write_text(document(run, before), encoding="utf-8")
    print(f"{terminal(run)}\n{html}, {markdown}")
