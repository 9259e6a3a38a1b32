"""Why somebody else is faster, where that is so: (op, implementation) -> a sentence for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import results
from .table import times

REASONS: Mapping[tuple[str, str], str] = {}
NO_KERNEL = "no kernel of ours serves this call here yet: the reference, plain PyTorch, does"
UNKNOWN = "the reason has not been found yet"


def reason(case: Mapping[str, Any], peer: Mapping[str, Any], phase: str) -> str:
    """The written reason for this op and implementation, and how far we are from what bounds the op."""
    own = results.main_row(case)
    if own is not None and own["backend"] == "reference":
        return NO_KERNEL
    text = REASONS.get((case["op"], peer["peer"]), UNKNOWN)
    floors = [row for row in case["rows"] if row["kind"] == "floor"]
    if own is None or not floors:
        return text
    above = results.ratio(own, floors[0], phase)
    return f"{text}; ours takes {times(above)} the time of {floors[0]['peer']}" if above else text
