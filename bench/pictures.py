"""The pictures of README, docs and reports, made from results.

``python -m bench documents`` draws those of README and docs from the committed ones. Colours read well on light and dark; each
file holds the numbers that it shows, by which a test sees that it fits the results.
"""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from . import results
from .ceilings import BOUNDS
from .ops.peers import COMPILED, EAGER
from .results import Run
from .studies import smollm2

INK, GRID = "#7a818c", "#9aa1ae55"
OURS, OTHERS = "#2f7de0", ("#d9730d", "#8a4fc7", "#18896b")
STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "r1kernels", "font.family": "sans-serif", "font.size": 10,  # text stays text
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRID, "grid.color": GRID,
    "legend.frameon": False, "axes.facecolor": "none", "figure.facecolor": "none", "axes.labelcolor": INK,
    "axes.titlecolor": INK, "text.color": INK, "legend.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
Numbers = dict[str, dict[str, float]]


# --- numbers ---


def speed(run: Run) -> Numbers:
    """Op -> how many times our time eager PyTorch and the best of all others take, at the shape that stands for the op."""
    found: Numbers = {}
    for one in run.one_per_op():
        for name, row in (("eager", one.eager), ("best", one.best(one.phase))):
            if row and (value := row.over_ours(one.phase)):
                found.setdefault(one.case.op, {})[name] = round(value, 2)
    return found


def floors(run: Run) -> dict[str, tuple[float, str]]:
    """Case and phase -> the share of our time that the floor explains, and which floor binds."""
    found = {}
    for one in run.one_per_op():
        for phase, (floor, bound) in run.floors(one).items():
            seconds = one.ours[0].median(phase) if one.ours and phase in ("forward", "backward") else None
            if seconds:
                found[f"{one.case.op}, {phase}"] = (min(floor / seconds, 1.0), bound)
    return found


def errors(record: Mapping[str, Any]) -> Numbers:
    """Implementation of token_logprobs -> lead in nats -> error of the log-prob in float32."""
    found: Numbers = {}
    for row in record["rows"]:
        if row["op"] == "token_logprobs" and row["dtype"] == "float32":
            found[row["peer"]] = dict(zip(map(str, record["leads"]), row["errors"]["logp"], strict=True))
    return found


def ratios(record: Mapping[str, Any]) -> Numbers:
    """Run of ``python -m bench truncation`` -> step -> mean importance ratio before its update."""
    return {
        name: {str(step): round(value, 5) for step, value in enumerate(run["ratio_mean"])}
        for name, run in record["runs"].items()
    }


def stages(record: Mapping[str, Any]) -> Numbers:
    """Mark -> checkpoint -> its mean over the runs of ``python -m bench pipeline``, in %."""
    runs = [run["test"] for run in record["runs"]]
    labels = ("accuracy", "format", "one language", "helpful")
    return {
        label: {name: round(100 * fmean(run[name][key] for run in runs), 1) for name in runs[0]}
        for key, label in zip(("accuracy", "format", "language_consistency", "helpful"), labels, strict=True)
    }


# --- drawings ---


def draw_speed(numbers: Numbers, axes: Axes) -> None:
    for name, label, offset, colour in (
        ("best", "best of all others", -0.21, OURS),
        ("eager", EAGER, 0.21, OTHERS[0]),
    ):
        lengths = [each.get(name, 1) - 1 for each in numbers.values()]
        places = [place + offset for place in range(len(numbers))]
        axes.barh(places, lengths, 0.4, left=1, color=colour, label=label)
        for place, each in zip(places, numbers.values(), strict=True):
            if name in each:
                axes.text(max(each[name], 1) * 1.06, place, f"{each[name]:.3g}x", va="center", fontsize=7.5)
    axes.set_yticks(range(len(numbers)), list(numbers))
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = (1, 2, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.7, 250)
    axes.axvline(1, color=INK, linewidth=1)
    axes.grid(axis="x")
    axes.set_title("Time of others / ours, two CPU cores")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.05), ncols=2, fontsize=8.5)


def draw_floors(shares: Mapping[str, tuple[float, str]], axes: Axes) -> None:
    colours = dict(zip(BOUNDS, (OURS, *OTHERS), strict=False))
    for place, (share, bound) in enumerate(shares.values()):
        axes.barh(place, 100 * share, 0.7, color=colours[bound])
        axes.text(100 * share + 1, place, f"{100 * share:.0f} % {bound}", va="center", fontsize=8)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_title("Floor / our time, in %, and which floor binds")


def _lines(numbers: Numbers, axes: Axes, colours: Sequence[str], title: str, **style: Any) -> None:
    """A line for each name, over numbers or over words."""
    for (name, values), colour in zip(numbers.items(), colours, strict=True):
        places = [int(place) if place.isdigit() else place for place in values]
        line = "--" if name == COMPILED else "-"  # it lies on eager's line
        axes.plot(places, list(values.values()), line, color=colour, label=name, linewidth=2.2, **style)
    axes.grid(axis="y")
    axes.set_title(title)
    axes.legend(loc="center right", fontsize=8.5)


def draw_errors(numbers: Numbers, axes: Axes) -> None:
    ordered = {name: numbers[name] for name in sorted(numbers, key=lambda name: name != "r1kernels")}
    title = "Error of a log-prob against float64, float32"
    _lines(ordered, axes, (OURS, *OTHERS), title, marker="o", markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("how far the sampled token leads, in nats")


def draw_ratios(numbers: Numbers, axes: Axes) -> None:
    _lines(numbers, axes, (OTHERS[0], OURS), "Mean importance ratio before an update")
    axes.set_ylim(0.94, 1.01)
    axes.set_xlabel("step of GRPO, sampled at top-p 0.9")


def draw_stages(numbers: Numbers, axes: Axes) -> None:
    title = "Recipe tiny: each stage on held-out problems, in %"
    _lines(numbers, axes, (OURS, *OTHERS), title, marker="o", markersize=4)
    axes.legend(loc="center", bbox_to_anchor=(0.58, 0.36), ncols=4, fontsize=8.5)  # between the lines
    axes.set_ylim(0, 104)
    axes.tick_params(axis="x", rotation=30)


def draw_learning(numbers: Numbers, axes: Axes) -> None:
    shown = {name: {step: 100 * value for step, value in values.items()} for name, values in numbers.items()}
    _lines(shown, axes, (OURS, OTHERS[2], OTHERS[0])[: len(shown)], "SmolLM2-135M on training problems, in %")
    axes.set_ylim(0, 104)
    axes.set_xlabel(f"step of GRPO, means of {smollm2.WINDOW} steps")


def svg(draw: Callable[..., None], numbers: Any, size: tuple[float, float] = (5.6, 3.5)) -> str:
    """A picture of its own; "" where there is nothing to show."""
    if not numbers:
        return ""
    with plt.rc_context(dict(STYLE)):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(numbers, axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
        plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg ") :]


def described(picture: str, numbers: Numbers) -> str:
    """A picture that holds its numbers."""
    opened, tag, body = picture.partition(">\n")
    return f"{opened}{tag} <desc>{escape(json.dumps(numbers), quote=False)}</desc>\n{body}"


def shown(text: str) -> Numbers:
    """The numbers that a picture holds."""
    found = re.search(r"<desc>(.*?)</desc>", text)
    numbers: Numbers = json.loads(found[1]) if found else {}
    return numbers


Drawn = tuple[Callable[..., None], Numbers, tuple[float, float]]


def fitting(root: Path) -> dict[Path, Drawn]:
    """File of each picture -> how it is drawn, the numbers of the committed results, its size in inches."""
    ops = results.load(results.FOLDER / "cpu/ops.json")
    found: dict[str, Drawn] = {
        "speed": (draw_speed, speed(ops), (5.6, 5.2)),
        "error": (draw_errors, errors(results.committed("precision")), (5.6, 5.2)),
        "truncation": (draw_ratios, ratios(results.committed("truncation")), (5.6, 3.5)),
        "smollm2": (draw_learning, smollm2.curve(smollm2.metrics("zero", "zero")), (5.6, 3.5)),
        "smollm2-languages": (
            draw_learning,
            smollm2.curve(smollm2.metrics("languages", "rl_reasoning")),
            (5.6, 3.5),
        ),
        "stages": (draw_stages, stages(results.committed("tiny")), (7.0, 3.5)),
    }
    return {root / f"docs/pictures/{name}.svg": drawn for name, drawn in found.items()}


def write(root: Path) -> list[Path]:
    """Draws the pictures that do not show the committed results, and names them."""
    written = []
    for path, (draw, numbers, size) in fitting(root).items():
        picture = described(svg(draw, numbers, size), numbers)
        if not path.is_file() or path.read_text(encoding="utf-8") != picture:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(picture, encoding="utf-8")
            written.append(path)
    return written
