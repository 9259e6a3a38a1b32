"""What a run prints: the backend of every op, the table of stages, final metrics."""

import r1kernels
from r1kernels import examples
from training.files import readable_bytes
from training.format import align, duration, percent
from training.pipeline import STAGES
from training.placement import device_of
from training.recipe import Recipe
from training.report.marks import MARKS, marks_of
from training.run_dir import RunDir, StageDir


def stages(run_dir: RunDir) -> str:
    """The table of stages with the marks of their checkpoints, in % of held-out problems, and their times."""
    recipe = run_dir.read_recipe()
    marks = marks_of(run_dir)
    rows = [["stage", *(title for _, title in MARKS), "time", "what it is"]]
    peak = 0
    for name in STAGES:
        record = run_dir.stage(name).record() if name in recipe.stages else None
        if record is None:
            continue
        peak = max(peak, record["peak_memory_bytes"])
        shown = {each: row for each, row in marks.items() if each == name or each.startswith(name + "-")} or {
            name: {}
        }
        for index, (each, row) in enumerate(shown.items()):
            cells = [percent(row.get(key)) for key, _ in MARKS]
            time = duration(record["stage_seconds"]) if index == 0 else ""
            rows.append([each, *cells, time, STAGES[name].title if index == 0 else ""])
    return "\n".join([*align(rows), "", f"largest memory {readable_bytes(peak)}"])


def final_metrics(stage: StageDir) -> str:
    """The final metrics of a stage, one per line."""
    metrics = (stage.record() or {}).get("metrics", {})
    rows = [
        [name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in metrics.items()
    ]
    return "\n".join(align(rows)) if rows else "no metrics"


def backends(recipe: Recipe) -> str:
    """One line: which backend of r1kernels serves which ops on this machine, for small calls."""
    device = device_of(recipe).type
    served: dict[str, list[str]] = {}
    for op, (arguments, keywords) in sorted(examples.calls(device).items()):
        for line in r1kernels.explain(op, *arguments, **keywords).splitlines()[1:]:
            name, state = line.split(maxsplit=1)
            if state == "runs":
                served.setdefault(name, []).append(op)
    plain = served.pop("reference", [])
    parts = [f"{name} for {', '.join(ops)}" for name, ops in served.items()]
    if plain:
        parts.append(f"reference (PyTorch) for {len(plain)} others; python -m r1kernels says why")
    return f"backends on {device}: " + "; ".join(parts)
