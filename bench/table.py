"""What documents, pages and terminals show: tables, lists and pictures, and how numbers read in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any


class Cell(str):
    """Text with a mark by which it stands out: "ours", "best", "failed" or "muted"."""

    mark: str

    def __new__(cls, text: str, mark: str = "") -> Cell:
        found = super().__new__(cls, text)
        found.mark = mark
        return found


def mark(cell: str) -> str:
    return getattr(cell, "mark", "")


MISSING = Cell("-", "muted")


@dataclass
class Table:
    """title: its heading. head: names of the columns; without any, rows are sentences. rows: of texts. note: a sentence above.

    picture: SVG, which stands in the place of rows and in pages alone. level: of its heading; pages fold those of 3.
    """

    title: str
    head: Sequence[str] = ()
    rows: list[Any] = field(default_factory=list)
    note: str = ""
    picture: str = ""
    level: int = 2

    @property
    def failed(self) -> bool:
        return any(mark(cell) == "failed" for row in self.rows for cell in row)

    @property
    def empty(self) -> bool:
        return not self.rows and not self.picture and (bool(self.head) or not self.note)

    def markdown(self, level: int = 0) -> str:
        """Heading of this level (0: none), note and rows; what failed is bold, and so is what is best."""
        heading = f"{'#' * level} {self.title}" if level else ""
        lines = [f"- {line}" for line in self.rows]
        if self.head:
            rows = [[name or " " for name in self.head], *(map(_bold, row) for row in self.rows)]
            lines = [f"| {' | '.join(row)} |" for row in rows]
            lines.insert(1, "|---" * len(self.head) + "|")
        return "\n\n".join(filter(None, (heading, self.note, "\n".join(lines))))

    def html(self) -> str:
        """Everything but the heading."""
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        if not self.head:
            lines = "".join(f"<li>{escape(line)}</li>" for line in self.rows)
            return note + self.picture + (f"<ul>{lines}</ul>" if lines else "")
        head = "".join(f"<th>{escape(name)}</th>" for name in self.head)
        cells = (
            "".join(f'<td class="{mark(cell)}">{escape(cell)}</td>' for cell in row) for row in self.rows
        )
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f'{note}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bold(cell: str) -> str:
    text = cell.replace("|", "\\|")
    return f"**{text}**" if text and mark(cell) in ("failed", "best") else text


def milliseconds(seconds: float | None) -> str:
    """0.0126 -> "12.6"; "-" for None."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def times(value: float | None) -> str:
    """2.345 -> "2.3x"."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{0 if value >= 10 else 1 if value >= 2 else 2}f}x"


def small(value: float | None) -> str:
    """An error: 4.4e-08."""
    if value is None:
        return "-"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def size(count: float | None) -> str:
    """Bytes as people read them: 268435456 -> "256 MiB"."""
    if count is None:
        return "-"
    unit = 0
    while count >= 1024 and unit < 4:
        count, unit = count / 1024, unit + 1
    return f"{count:.{1 if unit and count < 10 else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def rate(value: float, unit: str) -> str:
    """1.77e11, "FLOP/s" -> "177 GFLOP/s"."""
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= s), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}"
