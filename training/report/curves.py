"""Curves as inline SVG by matplotlib, in colours of the page, so that they read well on light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from training.report.marks import number

# Placeholder colours that matplotlib draws with, and the CSS variables that take their place in the SVG.
INK, GRID = "#010101", "#020202"
SERIES = tuple(f"#0{digit}0{digit}0{digit}" for digit in range(3, 9))
_VARIABLES = {INK: "var(--muted)", GRID: "var(--line)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)
}
PANEL_WIDTH = 2.45  # inches: five of them are as wide as the page
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.7,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a title and the metrics in it, name in metrics.jsonl -> label."""

    title: str
    metrics: Mapping[str, str]
    share: bool = False  # the values are shares: the axis shows 0 to 100 %


GRPO_PANELS = (
    Panel("reward", {"reward": "total"}),
    Panel(
        "accuracy, format, language",
        {"accuracy": "accuracy", "format": "format", "language_consistency": "language"},
        True,
    ),
    Panel("length (tokens)", {"length": "mean"}),
    Panel("entropy and KL", {"entropy": "entropy", "kl": "KL to the reference"}),
    Panel("groups without spread", {"zero_std_groups": "share"}, True),
)
LOSS_PANELS = (Panel("loss", {"loss": "loss"}), Panel("expert load (max / mean)", {"expert_load": "load"}))


def with_reward_terms(panels: Sequence[Panel], rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The panels, with every reward term of the rows in the first one."""
    terms = dict.fromkeys(name for row in rows for name in row if name.startswith("reward/"))
    first = Panel(panels[0].title, {**panels[0].metrics, **{term: label(term) for term in terms}})
    return [first, *panels[1:]]


def label(term: str) -> str:
    """ "reward/language_consistency" -> "language": the name of a reward term in a legend."""
    return {"language_consistency": "language"}.get(
        term.removeprefix("reward/"), term.removeprefix("reward/")
    )


def figure(name: str, rows: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> str:
    """An SVG with the panels side by side; panels without a value are left out; "" where none is left."""
    series = [(panel, _series(rows, panel)) for panel in panels]
    series = [(panel, lines) for panel, lines in series if lines]
    if not series:
        return ""
    with plt.rc_context({**STYLE, "svg.hashsalt": name}):
        size = (PANEL_WIDTH * max(len(series), 2), 2.2)
        figure, axes = plt.subplots(1, len(series), figsize=size, squeeze=False, layout="constrained")
        for axis, (panel, lines) in zip(axes[0], series, strict=True):
            _draw(axis, panel, lines)
        return _svg(figure, f"curves of {name}")


def levels_figure(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy and length at every level of difficulty over the steps, and one against the other; "" where there is one level."""
    levels = [key.partition("/")[2] for row in rows for key in row if key.startswith("accuracy/")]
    panels = (
        Panel("accuracy by level", {f"accuracy/{level}": level for level in sorted(set(levels))}, True),
        Panel("length by level (tokens)", {f"length/{level}": level for level in sorted(set(levels))}),
    )
    lines = [_series(rows, panel) for panel in panels]
    if not lines[0]:
        return ""
    with plt.rc_context({**STYLE, "svg.hashsalt": f"levels of {name}"}):
        figure, axes = plt.subplots(1, 3, figsize=(5 * PANEL_WIDTH, 2.2), layout="constrained")
        for axis, panel, series in zip(axes, panels, lines, strict=False):
            _draw(axis, panel, series)
        _draw_against(axes[2], dict(lines[1]), dict(lines[0]))
        return _svg(figure, f"levels of {name}")


def _draw_against(
    axis: Axes,
    lengths: Mapping[str, list[tuple[float, float]]],
    accuracies: Mapping[str, list[tuple[float, float]]],
) -> None:
    """The way of every level from its first steps to its last ones, which end in a dot."""
    for index, (level, values) in enumerate(accuracies.items()):
        accuracy, length = dict(values), dict(lengths.get(level, ()))
        steps = sorted(accuracy.keys() & length.keys())
        x, y = (_trend([of[step] for step in steps]) for of in (length, accuracy))
        colour = SERIES[index % len(SERIES)]
        axis.plot(x, [100 * value for value in y], color=colour)
        axis.plot(x[-1:], [100 * value for value in y[-1:]], color=colour, marker="o", markersize=4)
    axis.set_title("accuracy (%) against length (tokens)")
    axis.set_ylim(-3, 103)
    axis.tick_params(length=0)


def _trend(values: Sequence[float]) -> list[float]:
    """A mean over the values around each, a sixth of the series wide: a step has few problems of a level."""
    half = max(1, len(values) // 12)
    return [fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def reach_figure(reach: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """pass@k over k, a pair of axes for every split and a line for every checkpoint. reach: split -> checkpoint -> k -> share."""
    if not reach:
        return ""
    with plt.rc_context({**STYLE, "svg.hashsalt": "reach"}):
        size = (PANEL_WIDTH * max(len(reach), 2), 2.2)
        figure, axes = plt.subplots(1, len(reach), figsize=size, squeeze=False, layout="constrained")
        for axis, (split, lines) in zip(axes[0], reach.items(), strict=True):
            named = [(name, [(float(k), share) for k, share in of.items()]) for name, of in lines.items()]
            _draw(axis, Panel(split, {}, True), named)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_xlabel("k")
        return _svg(figure, "reach")


def load_figure(by_stage: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Expert load over the course of every stage that has experts, each on a common axis from its start to its end."""
    lines = {stage: _values(rows, "expert_load") for stage, rows in by_stage.items()}
    lines = {stage: values for stage, values in lines.items() if any(value for _, value in values)}
    if not lines:
        return ""
    with plt.rc_context({**STYLE, "svg.hashsalt": "expert load"}):
        figure, axis = plt.subplots(figsize=(5 * PANEL_WIDTH, 2.2), layout="constrained")
        start = 0.0
        ticks = []
        for index, (stage, values) in enumerate(lines.items()):
            colour = SERIES[index % len(SERIES)]
            x = [start + position / max(len(values) - 1, 1) for position in range(len(values))]
            y = [value for _, value in values]
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(x, smooth(y), color=colour, marker="o" if len(y) == 1 else "", markersize=4)
            ticks.append((start + 0.5, stage))
            start += 1.08
        axis.axhline(1.0, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axis.set_xticks([x for x, _ in ticks], [stage for _, stage in ticks])
        axis.tick_params(axis="x", length=0)
        axis.set_title("load of the busiest expert over the mean (1 is even)")
        return _svg(figure, "expert load")


def smooth(values: Sequence[float]) -> list[float]:
    """A mean over the values around each, a twentieth of the series wide, so that a trend is seen through the noise."""
    half = len(values) // 40
    return [
        sum(values[max(0, at - half) : at + half + 1]) / len(values[max(0, at - half) : at + half + 1])
        for at in range(len(values))
    ]


def _series(rows: Sequence[Mapping[str, Any]], panel: Panel) -> list[tuple[str, list[tuple[float, float]]]]:
    found = [(label, _values(rows, metric)) for metric, label in panel.metrics.items()]
    return [(label, values) for label, values in found if any(value != 0 for _, value in values)]


def _values(rows: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    values = []
    for position, row in enumerate(rows):
        value = number(row.get(metric))
        if value is not None:
            step = number(row.get("step"))
            values.append((float(position) if step is None else step, value))
    return values


def _draw(axis: Axes, panel: Panel, lines: list[tuple[str, list[tuple[float, float]]]]) -> None:
    scale = 100 if panel.share else 1
    for index, (label, values) in enumerate(lines):
        colour = SERIES[index % len(SERIES)]
        x = [step for step, _ in values]
        y = [scale * value for _, value in values]
        if len(y) > 40:
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(x, smooth(y), color=colour, label=label, marker="o" if len(y) == 1 else "", markersize=4)
    axis.set_title(panel.title + (" (%)" if panel.share else ""))
    if panel.share:
        axis.set_ylim(-3, 103)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if len(lines) > 1:
        axis.legend(
            fontsize=7.5,
            loc="upper left",
            bbox_to_anchor=(-0.05, -0.12),
            ncols=2,
            handlelength=1.1,
            columnspacing=1.2,
            labelspacing=0.25,
            borderpad=0,
        )


def _svg(figure: Any, label: str) -> str:
    text = io.StringIO()
    # `savefig` draws the figure once more, to lay it out, which drawing does itself
    figure.canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Ids must be unique on the page that holds several of these pictures.
    prefix = re.sub(r"[^a-z0-9]+", "-", label.lower())
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
