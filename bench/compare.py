"""What became faster or slower between two results. A machine that is busier moves everyone: a verdict allows for what eager
PyTorch changed by."""

from pathlib import Path

from .results import Measured, Row, Run, load
from .table import MISSING, Cell, Table, milliseconds, small, times

BAND = 0.15  # changes below this are within what two runs on one machine differ by
HEAD = ("case", "implementation", "before, ms", "after, ms", "after / before", "eager's", "error", "verdict")


def changes(before: Run, after: Run) -> Table:
    """A row for each of ours in the cases that both have."""
    note = (
        f"Against {before.date}, commit {before.commits}: shortest rounds of forward and backward. The verdict allows for "
        f"what eager PyTorch changed by, and for {100 * BAND:.0f} % of noise."
    )
    known = {one.case.id: one for one in before.cases}
    both = [(known[one.case.id], one) for one in after.cases if one.case.id in known]
    return Table("Changes", HEAD, [_change(old, new, row) for old, new in both for row in new.ours], note)


def _change(old: Measured, new: Measured, row: Row) -> list[str]:
    def shortest(one: Measured, peer: Row | None) -> float | None:
        same = peer and one.named(peer.peer)
        return same.shortest(new.phase) if same else None

    was, now = shortest(old, row), row.shortest(new.phase)
    eager = (shortest(old, new.eager), shortest(new, new.eager))
    control = eager[1] / eager[0] if eager[0] and eager[1] else None
    start, error = [new.title, row.peer, milliseconds(was), milliseconds(now)], small(row.error(new.phase))
    if row.status == "failed":
        return [*start, MISSING, MISSING, error, Cell("FAILED", "failed")]
    if not was or not now:
        return [*start, MISSING, MISSING, error, "no time before" if now else "no time"]
    change = now / was / (control or 1.0)
    verdict = "same"
    if abs(change - 1) > BAND:
        verdict = Cell("slower", "failed") if change > 1 else Cell("faster", "best")
    return [*start, times(now / was), times(control), error, verdict]


def main(before: Path, after: Path) -> None:
    print(changes(load(before), load(after)).markdown())
