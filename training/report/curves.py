"""Curves as inline SVG by matplotlib, in colours of the page, so that they read well on light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

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
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
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
