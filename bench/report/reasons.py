"""Why someone else is faster, where that is so: a sentence for the report, from the numbers of the case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import results
from .table import milliseconds, times

NO_KERNEL = "no kernel of ours serves this call here yet: the reference, plain PyTorch, does"
# shorter calls whose floor is this far below them are spent on the way to the kernel
_SHORT_SECONDS, _FAR_FROM_FLOOR = 1e-3, 20.0
# within this of what bounds an op there is nothing left to gain
_AT_THE_FLOOR = 1.15


def reason(case: Mapping[str, Any], peer: Mapping[str, Any], phase: str) -> str:
    """Ours and theirs against the floor, and the sentence that follows from it."""
    own, work = results.main_row(case), case["phases"].get(phase)
    seconds = results.median(own, phase) if own else None
    if own is None or seconds is None:
        return "ours has no time"
    if own["backend"] == "reference":
        return NO_KERNEL
    if not work or not work["floor_seconds"]:
        parts = {name: results.median(own, name) for name in own["samples"] if name != phase}
        slower = {
            name: found / theirs
            for name, found in parts.items()
            if found and (theirs := results.median(peer, name)) and found > theirs
        }
        worst = max(slower, key=slower.__getitem__, default="")
        return (
            f"most is lost in {worst}, {times(slower[worst])} theirs" if worst else "no single part is slower"
        )
    floor, bound = work["floor_seconds"], work["bound"]
    above = seconds / floor
    overhead = own["overhead"].get(phase, 0.0)
    if overhead > floor:
        return (
            f"the {bound} floor of this work is {milliseconds(floor)} ms and ours takes {milliseconds(seconds)} ms, of "
            f"which {milliseconds(overhead)} ms at any size: so long a call takes at a tiny shape"
        )
    if seconds < _SHORT_SECONDS and above > _FAR_FROM_FLOOR:
        return (
            f"the {bound} floor of this work is {milliseconds(floor)} ms and ours takes {milliseconds(seconds)} ms: at "
            "this size time goes into what surrounds the work (checks, dispatch, threads that wake each other)"
        )
    theirs = results.median(peer, phase)
    text = f"ours takes {times(above)} the {bound} floor, theirs {times(theirs / floor if theirs else None)}"
    bare = [row for row in case["rows"] if row["kind"] == "floor"]
    to_bare = results.ratio(bare[0], own, phase) if bare else None
    if to_bare:
        text += f"; {bare[0]['peer']} alone take {times(to_bare)} our time"
    least = min(above, 1 / to_bare) if to_bare else above
    return text + ("; there is next to nothing left to gain" if least < _AT_THE_FLOOR else "")
