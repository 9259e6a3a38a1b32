"""A table of text that every form of the report shows, and how numbers read in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """mark: "" or how it stands out: "ours", "best", "failed", "muted"."""

    text: str
    mark: str = ""


@dataclass
class Table:
    """title: its heading; note: a sentence above it; head: names of the columns, the first of which is text."""

    title: str
    head: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""


MISSING = Cell("-", "muted")


def milliseconds(seconds: float | None) -> str:
    """0.0126 -> "12.6"; "-" for None."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float | None) -> str:
    """2.345 -> "2.3x"."""
    if value is None or not math.isfinite(value):
        return "-"
    return (
        f"{value:.0f}x"
        if value >= 20
        else f"{value:.2g}x"
        if value >= 10
        else f"{value:.1f}x"
        if value >= 2
        else f"{value:.2f}x"
    )


def small(value: float | None) -> str:
    """An error: 4.4e-08."""
    if value is None:
        return "-"
    return "not finite" if not math.isfinite(value) else f"{value:.1e}"


def size(count: float | None) -> str:
    """Bytes as people read them: 268435456 -> "256 MiB"."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def rate(value: float, unit: str) -> str:
    """1.77e11, "FLOP/s" -> "177 GFLOP/s"."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
