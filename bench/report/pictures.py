"""Pictures as inline SVG in colours of the page: the roofline of the ops that multiply matrices, and shares of the floor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .. import results
from .table import milliseconds, rate, times

WIDTH, HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 44
SERIES = ("var(--series-0)", "var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--series-5)")


def bars(case: Mapping[str, Any]) -> str:
    """One bar an implementation, forward and backward (or the step) together; the floor is the line across them."""
    phase = results.main_phase(case)
    timed = [(row, seconds) for row in case["rows"] if (seconds := results.median(row, phase)) is not None]
    if not timed:
        return ""
    longest = max(seconds for _, seconds in timed)
    colours = {"ours": "var(--accent)", "peer": "var(--series-4)", "floor": "var(--series-6)"}
    lines = []
    for row, seconds in sorted(timed, key=lambda pair: pair[1]):
        share = max(100 * seconds / longest, 0.4)
        lines.append(
            f'<div class="bar"><span>{escape(row["peer"])}</span><i><b style="width:{share:.1f}%;'
            f'background:{colours[row["kind"]]}"></b></i><em>{milliseconds(seconds)} ms</em></div>'
        )
    floor = case["phases"].get(phase)
    note = f"floor {milliseconds(floor['floor_seconds'])} ms ({floor['bound']})" if floor else ""
    return f'<div class="bars">{"".join(lines)}<small>{phase}; {note}</small></div>'


def floor_shares(record: Mapping[str, Any]) -> str:
    """For every case the share of our time that the floor explains, forward and backward, by what binds."""
    lines = []
    for case in record["cases"]:
        own = results.main_row(case)
        for phase in ("forward", "backward"):
            seconds = results.median(own, phase) if own else None
            found = case["phases"].get(phase)
            if seconds and found:
                share = min(found["floor_seconds"] / seconds, 1.0)
                colour = SERIES[("bandwidth", "GEMM", "exp").index(found["bound"])]
                lines.append(
                    f'<div class="bar wide-label"><span>{escape(results.title(case))}, {phase}</span><i><b '
                    f'style="width:{100 * share:.1f}%;background:{colour}"></b></i><em>{100 * share:.0f} % '
                    f"{found['bound']}</em></div>"
                )
    legend = "".join(
        f'<span><b style="background:{colour}"></b>{name}</span>'
        for colour, name in zip(SERIES, ("bandwidth", "GEMM", "exp"), strict=False)
    )
    return f'<div class="legend">{legend}</div><div class="bars">{"".join(lines)}</div>' if lines else ""


def roofline(record: Mapping[str, Any]) -> str:
    """FLOP/s against FLOPs a byte, both logarithmic: ours and the best peer's, without and with the backward."""
    points = _points(record)
    if not points:
        return ""
    ceilings = record["ceilings"]
    peak = {name: value for name, value in ceilings["flops_per_second"].items()}
    xs = [x for x, *_ in points]
    ys = [y for _, y, *_ in points] + list(peak.values())
    plot = _Plot(min(xs) / 2, max(xs) * 2, min(ys) / 3, max(ys) * 1.6)
    parts = [plot.frame("FLOPs a byte (algorithmic)", "FLOP/s")]
    bandwidth = ceilings["bytes_per_second"]
    for index, (name, value) in enumerate(peak.items()):
        knee = value / bandwidth
        colour = SERIES[index]
        start = max(plot.x0, plot.y0 / bandwidth)
        parts.append(
            plot.path(
                [(start, start * bandwidth), (min(knee, plot.x1), min(value, plot.x1 * bandwidth))], colour
            )
        )
        if knee < plot.x1:
            parts.append(plot.path([(max(knee, plot.x0), value), (plot.x1, value)], colour))
        parts.append(
            plot.text(min(max(knee, plot.x0), plot.x1), value, f"{name}: {rate(value, 'FLOP/s')}", colour)
        )
    for x, y, dtype, kind, label in points:
        colour = SERIES[list(peak).index(dtype)]
        parts.append(plot.dot(x, y, colour, filled=kind == "ours", label=label))
    legend = "filled: ours; hollow: the best of the others; colour: dtype. Point at a dot for its name."
    return f"{plot.svg(parts, 'roofline')}<small>{legend}</small>"


def _points(record: Mapping[str, Any]) -> list[tuple[float, float, str, str, str]]:
    found = []
    for case in record["cases"]:
        # not the forward and the backward apart: some compute their gradients in the forward
        for phase in ("inference", "forward+backward"):
            work = case["phases"].get(phase)
            if not work or not work["flops"]:
                continue
            for row in (results.main_row(case), results.best_peer(case, phase)):
                seconds = results.median(row, phase) if row else None
                if row and seconds:
                    label = f"{results.title(case)}, {phase}: {row['peer']}, {times(seconds / work['floor_seconds'])} the floor"
                    intensity = work["flops"] / work["bytes"]
                    found.append((intensity, work["flops"] / seconds, case["dtype"], row["kind"], label))
    return found


class _Plot:
    """A pair of logarithmic axes."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float) -> None:
        self.x0, self.x1, self.y0, self.y1 = x0, x1, y0, y1

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = math.log(x / self.x0) / math.log(self.x1 / self.x0)
        up = math.log(y / self.y0) / math.log(self.y1 / self.y0)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_title: str, y_title: str) -> str:
        parts = []
        for power in range(math.ceil(math.log10(self.x0)), math.floor(math.log10(self.x1)) + 1):
            x, y = self.at(10.0**power, self.y0)
            parts.append(f'<path d="M{x:.1f} {y:.1f}V{_TOP}" class="grid"/>')
            parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{10.0**power:g}</text>')
        for power in range(math.ceil(math.log10(self.y0)), math.floor(math.log10(self.y1)) + 1):
            x, y = self.at(self.x0, 10.0**power)
            parts.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - _RIGHT}" class="grid"/>')
            parts.append(
                f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{rate(10.0**power, "")}</text>'
            )
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
        parts.append(f'<text x="{_LEFT + 6}" y="{_TOP + 10}">{escape(y_title)}</text>')
        return "".join(parts)

    def path(self, points: Sequence[tuple[float, float]], colour: str) -> str:
        places = [self.at(x, y) for x, y in points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        return f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>'

    def text(self, x: float, y: float, text: str, colour: str) -> str:
        at_x, at_y = self.at(x, y)
        return f'<text x="{at_x - 4:.1f}" y="{at_y - 5:.1f}" text-anchor="end" style="fill:{colour}">{escape(text)}</text>'

    def dot(self, x: float, y: float, colour: str, filled: bool, label: str) -> str:
        at_x, at_y = self.at(x, y)
        fill = colour if filled else "var(--card)"
        return (
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="1.5">'
            f"<title>{escape(label)}</title></circle>"
        )

    def svg(self, parts: Sequence[str], label: str) -> str:
        return f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
