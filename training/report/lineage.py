"""The lineage drawing: which stage was made from which, as an inline SVG."""

from collections.abc import Mapping
from html import escape

from training.pipeline import STAGES, parents_of, plan
from training.recipe import Recipe, start_of

WIDTH, HEIGHT, GAP, TOP, LANE = 110, 44, 10, 68, 90
LANES = ("policy", "data", "critic")  # what a stage makes, from above; its marks are not drawn


def starts_from(stage: str, recipe: Recipe) -> str | None:
    """The stage whose weights a stage goes on from; None where it trains none, or students of their own."""
    return None if stage == "distill" else start_of(recipe, stage) or None


def drawing(recipe: Recipe, notes: Mapping[str, str]) -> str:
    """Boxes in the order of the pipeline; solid arrows are weights, dashed ones are samples, data or rewards.

    Args:
        recipe: decides the graph.
        notes: a second line for the box of a stage; a stage without one is not done and drawn pale.
    """
    shown = [name for name in plan(recipe) if name != "evaluate"]
    column = _columns(shown)
    x = {name: 10 + column[name] * (WIDTH + GAP) for name in shown}
    y = {name: TOP + LANES.index(STAGES[name].makes) * LANE for name in shown}
    parts = []
    for name in shown:
        for parent in parents_of(name, recipe):
            solid = starts_from(name, recipe) == parent
            parts.append(_edge(x[parent], y[parent], x[name], y[name], column[name] - column[parent], solid))
    for name in shown:
        note = notes.get(name)
        kind = STAGES[name].makes + ("" if note is not None else " pending")
        parts.append(
            f'<g class="{kind}"><rect x="{x[name]}" y="{y[name]}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
            f'<text x="{x[name] + WIDTH / 2}" y="{y[name] + 19}">{escape(name)}</text>'
            f'<text class="note" x="{x[name] + WIDTH / 2}" y="{y[name] + 35}">{escape(note or "not done")}</text></g>'
        )
    width = max(x.values()) + WIDTH + 10
    height = max(y.values()) + HEIGHT + 16
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    # few stages are not blown up to the width of the page, and nothing is wider than it is drawn on a phone
    sizes = f"max-width: {width}px; min-width: min({width}px, 760px)"
    return (
        f'<svg class="lineage" viewBox="0 0 {width} {height}" style="{sizes}" role="img" '
        f'aria-label="lineage of the stages">{marker}{"".join(parts)}</svg>'
    )


def _columns(shown: list[str]) -> dict[str, int]:
    """A column for each stage: a step to the right of the one before, so that every arrow points to the right."""
    return {name: index for index, name in enumerate(shown)}


def _edge(x1: float, y1: float, x2: float, y2: float, span: int, solid: bool) -> str:
    """A curve from one box to another; in the same lane it arches over what stands between."""
    kind = "weights" if solid else "samples"
    if y1 == y2 and span > 1:
        lift = min(12 + 6 * span, TOP - 8)
        start, end = x1 + WIDTH * 0.75, x2 + WIDTH * 0.3
        path = f"M{start} {y1}C{start + 30} {y1 - lift} {end - 30} {y2 - lift} {end} {y2 - 2}"
    elif y1 == y2:
        path = f"M{x1 + WIDTH} {y1 + HEIGHT / 2}L{x2 - 2} {y2 + HEIGHT / 2}"
    else:
        down = y2 > y1
        start_y, end_y = (y1 + HEIGHT, y2 - 2) if down else (y1, y2 + HEIGHT + 2)
        start, end = x1 + WIDTH * 0.6, x2 + WIDTH * (0.25 if span > 1 else 0.4)
        bend = (end_y - start_y) * 0.55
        path = f"M{start} {start_y}C{start} {start_y + bend} {end} {end_y - bend} {end} {end_y}"
    return f'<path class="edge {kind}" d="{path}" marker-end="url(#arrow)"/>'
