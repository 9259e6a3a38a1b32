"""Results as tables: the environment, the headline, one table a case, what failed, what was not run, what changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from training.format import duration

from .. import noise, results
from ..peers import PHASES
from ..step import PARTS
from ..turns import SECONDS
from .reasons import reason
from .table import MISSING, Cell, Table, milliseconds, rate, size, small, times

Case = Mapping[str, Any]
NOT_ON_A_GPU = "Not measured on a GPU: these numbers are of a CPU. The shapes for GPUs are in the list of what was not run."
FIRST_CALL = "first call of a turn"
FIRST_CALLS = (
    f"A call shorter than {milliseconds(SECONDS)} ms is made several times in a turn: times are those of the calls after "
    f'the first; a line "{FIRST_CALL}" holds those of the first, right after other code ran and filled the caches.'
)
HEADLINE = (
    "op",
    "shape",
    "dtype",
    "ours, ms",
    "best of the others",
    "its ms",
    "others / ours",
    "eager / ours",
    "ours / floor",
    "our error",
    "its error",
)


def environment(record: Mapping[str, Any]) -> Table:
    """Machine, versions, load and the measured ceilings."""
    made, ceilings = record["environment"], record["ceilings"]
    flops = ", ".join(
        f"{rate(value, 'FLOP/s')} {name}" for name, value in ceilings["flops_per_second"].items()
    )
    facts = {
        "device": made.get("gpu", made["processor"]),
        "threads": str(made["threads"]),
        "date, commit": f"{record['date']}, {commits(record)}",
        "measuring took": duration(sum(case.get("seconds", 0.0) for case in record["cases"])),
        "kind of run": "quick: fewer shapes and rounds" if record["quick"] else "all shapes that fit",
        "load": load(record),
        "Python": made["python"],
        "r1kernels": f"{made['r1kernels']}, extension {made['extension']}",
        **{name: found or "not installed" for name, found in made["packages"].items()},
        "copy": rate(ceilings["bytes_per_second"], "B/s"),
        "GEMM": flops,
        "exp": rate(ceilings["exps_per_second"], "/s"),
    }
    return Table("Environment", ("", ""), [[Cell(name), Cell(value)] for name, value in facts.items()])


def commits(record: Mapping[str, Any]) -> str:
    """What was measured; several where a run was made in parts."""
    return ", ".join(results.commits(record))


def load(record: Mapping[str, Any]) -> str:
    """ "load average 0.4 to 2.1, our own threads included; a fixed work repeats within 3 %" """
    loads, spreads = results.loads(record), results.noises(record)
    if not loads:
        return "nothing was measured"
    text = f"load average {min(loads):.1f} to {max(loads):.1f}, our own threads included"
    if spreads:
        text += f"; a fixed work between the cases repeats within {100 * (max(spreads) - 1):.0f} %"
    return text


def noise_warning(record: Mapping[str, Any]) -> str:
    """A sentence if something else was at work on the machine, else nothing."""
    spreads = results.noises(record)
    many = sum(value > noise.MACHINE_LIMIT for value in spreads)
    if not many:
        return ""
    return (
        f"The machine was not quiet: {many} of {len(spreads)} times the median of a fixed work lay more than "
        f"{100 * (noise.MACHINE_LIMIT - 1):.0f} % above its shortest. Trust ratios more than times."
    )


def noisy(record: Mapping[str, Any]) -> list[str]:
    """A sentence for every case of which our rounds, or those of the best of the others, do not repeat."""
    lines = []
    for case in record["cases"]:
        phase = results.main_phase(case)
        for row in (results.main_row(case), results.best_peer(case, phase)):
            found = results.rounds_spread(row, phase) if row else None
            if row and found and found > noise.ROUNDS_LIMIT:
                lines.append(
                    f"{results.title(case)}: the median of {row['peer']} is {times(found)} its shortest round."
                )
    return lines


def headline(record: Mapping[str, Any]) -> Table:
    """Forward and backward, or the whole step: ours against the best of the others, case by case."""
    note = (
        "Forward and backward together (of the trainer a whole step), median of the rounds; ratios are paired within "
        "a round: above 1 we are faster. Errors are the largest against float64, over results and gradients."
    )
    return _against_the_best("Headline", note, record, results.main_phase)


def inference(record: Mapping[str, Any]) -> Table:
    """The same for a forward without gradients, which two of the three passes of GRPO are."""
    cases = [case for case in record["cases"] if case["op"] != "grpo_step"]
    note = (
        "One forward without gradients; peers that compute their gradients in the forward do not do so here."
    )
    return _against_the_best("Inference", note, {"cases": cases}, lambda case: "inference")


def _against_the_best(
    title: str, note: str, record: Mapping[str, Any], phase_of: Callable[[Case], str]
) -> Table:
    table = Table(title, HEADLINE, note=note)
    for case in record["cases"]:
        own, phase = results.main_row(case), phase_of(case)
        if own is None:
            continue
        table.rows.append(_headline_row(case, own, phase))
        if own["status"] == "ok" and results.has_first_calls(case, phase):
            cells = _headline_row(results.first_calls(case), results.of_first_calls(own), phase)
            table.rows.append([Cell(""), Cell(FIRST_CALL, "muted"), Cell(""), *cells[3:]])
    return _explained(table)


def _explained(table: Table) -> Table:
    """The note says what first calls are where the table has some."""
    if any(cell.text == FIRST_CALL for row in table.rows for cell in row[:2]):
        table.note += f" {FIRST_CALLS}"
    return table


def _headline_row(case: Case, own: Mapping[str, Any], phase: str) -> list[Cell]:
    start = _case_cells(case)
    if own["status"] != "ok":
        return [*start, Cell(state(own), "failed"), *[MISSING] * (len(HEADLINE) - 4)]
    peer, eager = results.best_peer(case, phase), results.eager(case)
    seconds = results.median(own, phase)
    floor = case["phases"].get(phase, {}).get("floor_seconds")
    above_floor = (
        Cell(f"{times(seconds / floor)} {case['phases'][phase]['bound']}") if floor and seconds else MISSING
    )
    ours_cell = Cell(milliseconds(seconds), "ours")
    error = Cell(small(results.worst_error(own, phase)))
    to_eager = Cell(times(results.ratio(eager, own, phase))) if eager else MISSING
    if peer is None:
        return [*start, ours_cell, MISSING, MISSING, MISSING, to_eager, above_floor, error, MISSING]
    faster = results.ratio(peer, own, phase)
    verdict = "best" if faster is not None and faster >= 1 else "failed"
    theirs = results.worst_error(peer, phase)
    return [
        *start,
        ours_cell,
        Cell(peer["peer"]),
        Cell(milliseconds(results.median(peer, phase))),
        Cell(times(faster) + ("" if verdict == "best" else ", slower"), verdict),
        to_eager,
        above_floor,
        error,
        Cell(small(theirs)),
    ]


def floors(record: Mapping[str, Any]) -> Table:
    """How near our implementations come to what binds each phase, and what bare GEMMs take beside them."""
    head = ("op", "shape", "dtype", "ours", *PHASES, "/ bare GEMMs", "peak memory")
    note = (
        "Floor / median time, and which floor binds; in brackets, where exponentials do, the same against the floor of the "
        "bytes alone. A phase passes 100 % where a product of ours is faster than torch's, with which the ceiling is "
        "measured, where what it reads is in the caches still, or where an earlier phase has done its work: the GRPO losses "
        "make their gradients in the forward. / bare GEMMs: our forward and backward over the products alone, of the head "
        "three or, with logits recomputed, four; dense: without experts, of the same FLOPs. Peak memory includes results and "
        "gradients."
    )
    table = Table("Floors", head, note=note)
    bandwidth = record["ceilings"]["bytes_per_second"]
    for case in record["cases"]:
        if case["op"] == "grpo_step":
            continue
        for row in results.ours(case):
            table.rows.append(
                [
                    *_case_cells(case),
                    Cell(row["peer"], "ours"),
                    *(_fraction_cell(case, row, phase, bandwidth) for phase in PHASES),
                    Cell(_over_bare(case, row)),
                    Cell(size(row["peak_bytes"])),
                ]
            )
    return table


def _case_cells(case: Case) -> list[Cell]:
    shape = ", ".join(f"{name} {count}" for name, count in case["sizes"].items())
    return [Cell(case["op"]), Cell(", ".join(filter(None, (shape, case["layout"])))), Cell(case["dtype"])]


def _fraction_cell(case: Case, row: Mapping[str, Any], phase: str, bandwidth: float) -> Cell:
    seconds, work = results.median(row, phase), case["phases"].get(phase)
    if seconds is None or not work:
        return MISSING
    text = f"{100 * work['floor_seconds'] / seconds:.0f} % {work['bound']}"
    if work["bound"] == "exp":
        text += f" ({100 * work['bytes'] / bandwidth / seconds:.0f} %)"
    return Cell(text)


def _over_bare(case: Case, row: Mapping[str, Any]) -> str:
    """ "1.05x three, 0.79x four" """
    phase = results.main_phase(case)
    bare = [other for other in case["rows"] if other["kind"] == "floor"]
    ratios = [(results.ratio(row, other, phase), other["peer"].split()[0]) for other in bare]
    return ", ".join(f"{times(ratio)} {name}" for ratio, name in ratios if ratio) or "-"


def best_ratio(case: Case) -> float | None:
    """How many times longer than ours the best of the others takes, in the phase of the headline."""
    phase = results.main_phase(case)
    own, peer = results.main_row(case), results.best_peer(case, phase)
    return results.ratio(peer, own, phase) if own and peer else None


def not_best(record: Mapping[str, Any]) -> list[str]:
    """A sentence for every case in which someone else is faster."""
    lines = []
    for case in record["cases"]:
        for phase in dict.fromkeys((results.main_phase(case), "inference")):
            views = [(case, phase)]
            if results.has_first_calls(case, phase):
                views.append((results.first_calls(case), f"{phase}, {FIRST_CALL}"))
            for shown, name in views:
                own, peer = results.main_row(shown), results.best_peer(shown, phase)
                faster = results.ratio(peer, own, phase) if own and peer else None
                if peer and faster is not None and faster < 1:
                    lines.append(
                        f"{results.title(case)}, {name}: {peer['peer']} takes {times(faster)} our time; "
                        f"{reason(shown, peer, phase)}."
                    )
    return lines


def case_table(case: Case) -> Table:
    """Every implementation of a case: times of each phase, ratio to ours, fraction of the floor, errors, memory."""
    phases = (*PARTS, "step") if case["op"] == "grpo_step" else PHASES
    head = ["implementation", *(f"{phase}, ms" for phase in phases), "/ ours", "/ floor", "error", "gradient error",
            "peak memory", "saved"]  # fmt: skip
    table = Table(results.title(case), head, note=_case_note(case))
    own = results.main_row(case)
    for row in case["rows"]:
        label = row["peer"] + (f" ({row['version']})" if row["kind"] == "peer" and row["version"] else "")
        label += f" [{row['backend']}]" if row["kind"] == "ours" and row["backend"] else ""
        name = Cell(label, "ours" if row["kind"] == "ours" else "muted" if row["kind"] == "floor" else "")
        if row["status"] != "ok":
            mark = "failed" if row["status"] == "failed" else "muted"
            table.rows.append([name, Cell(state(row), mark), *[Cell("")] * (len(head) - 2)])
            continue
        table.rows.append(
            [
                name,
                *_time_cells(case, row, own, phases),
                Cell(small(results.worst_error(row, "forward"))),
                Cell(small(results.worst_error(row, "backward"))),
                Cell(size(row["peak_bytes"])),
                Cell(size(row["saved_bytes"])),
            ]
        )
        if any(results.has_first_calls(case, phase) for phase in phases):
            cold = results.first_calls(case)
            cells = _time_cells(cold, results.of_first_calls(row), results.main_row(cold), phases)
            table.rows.append([Cell(FIRST_CALL, "muted"), *cells, *[Cell("")] * 4])
    return _explained(table)


def _time_cells(
    case: Case, row: Mapping[str, Any], own: Mapping[str, Any] | None, phases: Sequence[str]
) -> list[Cell]:
    """The phases, then in that of the headline the ratio to ours and to the floor."""
    main = results.main_phase(case)
    seconds, floor = results.median(row, main), case["phases"].get(main, {}).get("floor_seconds")
    return [
        *(_time_cell(case, row, phase) for phase in phases),
        Cell(times(results.ratio(row, own, main)) if own else "-"),
        Cell(times(seconds / floor) if floor and seconds else "-"),
    ]


def _time_cell(case: Case, row: Mapping[str, Any], phase: str) -> Cell:
    """Median, with the shortest round in brackets; the fastest of the case stands out."""
    seconds = results.median(row, phase)
    if seconds is None:
        return MISSING
    others = [
        found
        for other in case["rows"]
        if other["kind"] != "floor" and (found := results.median(other, phase)) is not None
    ]
    # forward and backward apart compare nothing: some compute their gradients in the forward
    compared = phase in ("inference", results.main_phase(case))
    mark = "best" if compared and row["kind"] != "floor" and seconds == min(others) else ""
    return Cell(f"{milliseconds(seconds)} ({milliseconds(results.fastest(row, phase))})", mark)


def _case_note(case: Case) -> str:
    """Rounds and floors; of short calls how many a turn makes, and what of ours is spent at any size."""
    made = {row["peer"]: max(map(len, row["samples"].values())) for row in case["rows"] if row["samples"]}
    rounds = max(made.values(), default=0)
    fewer = [f"{name} {count}" for name, count in made.items() if count < rounds]
    parts = [
        f"{rounds} rounds{' (' + ', '.join(fewer) + ')' if fewer else ''}; median, in brackets the shortest."
    ]
    floors = [
        f"{phase} {milliseconds(found['floor_seconds'])} ms ({found['bound']})"
        for phase, found in case["phases"].items()
        if phase in ("forward", "backward")
    ]
    if floors:
        parts.append(f"Floor: {', '.join(floors)}.")
    main, own = results.main_phase(case), results.main_row(case)
    several = [f"{row['peer']} {calls}" for row in case["rows"] if (calls := row["calls"].get(main, 1)) > 1]
    if several:
        parts.append(f"Calls a turn, {main}: {', '.join(several)}.")
    if own and main in own["overhead"]:
        spent, floor = own["overhead"][main], case["phases"][main]["floor_seconds"]
        binds = f", more than the {main} floor of this one" if spent > floor else ""
        parts.append(f"At a tiny shape a call of ours takes {milliseconds(spent)} ms{binds}.")
    return " ".join(parts)


def state(row: Mapping[str, Any]) -> str:
    """ "FAILED: ..." or why a row is missing."""
    return ("FAILED: " if row["status"] == "failed" else "") + row["reason"]


def failures(record: Mapping[str, Any]) -> list[str]:
    """What of ours broke the numeric rule or raised; others that did stand in the tables of their cases."""
    return [
        f"{results.title(case)}: {row['peer']}: {row['reason']}"
        for case in record["cases"]
        for row in case["rows"]
        if row["status"] == "failed" and row["kind"] == "ours"
    ]


def not_run(record: Mapping[str, Any]) -> Table:
    """Cases without numbers, and why."""
    rows = [[Cell(entry["id"]), Cell(entry["reason"], "muted")] for entry in record["not_run"]]
    return Table("Not run", ("case", "reason"), rows)


def one_per_op(record: Mapping[str, Any]) -> list[Case]:
    """Of each op the case that stands for it: float32 at the shape of a model, else of a quick run, else the first."""

    def rank(case: Case) -> tuple[bool, ...]:
        model = case["model"] and "decode" not in case["model"] and "scaled" not in case["model"]
        return case["dtype"] != "float32", not model, not case["quick"]

    return [min(cases, key=rank) for _, cases in by_op(record["cases"])]


def summary(record: Mapping[str, Any]) -> Table:
    """A row per op: ours, the best of the others, eager PyTorch, and the errors."""
    head = (
        "op",
        "shape",
        "ours, ms",
        "best of the others",
        "its ms",
        "others / ours",
        "eager / ours",
        "our error",
        "its error",
    )
    table = Table("Summary", head)
    for case in one_per_op(record):
        own = results.main_row(case)
        if own is not None and own["status"] == "ok":
            row = _headline_row(case, own, results.main_phase(case))
            table.rows.append([*row[:2], *row[3:8], *row[9:]])
    return table


def by_op(cases: Sequence[Case]) -> Iterable[tuple[str, list[Case]]]:
    """Cases grouped by op, in order."""
    for op in dict.fromkeys(case["op"] for case in cases):
        yield op, [case for case in cases if case["op"] == op]
