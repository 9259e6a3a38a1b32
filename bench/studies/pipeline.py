"""The marks of whole pipeline runs of one recipe.

python -m training run tiny --run runs/tiny-4 seed=4
python -m training run tiny --run runs/tiny-5 seed=5
python -m bench pipeline runs/tiny-4 runs/tiny-5 --out bench/results/cpu/tiny.json

The controls start from the base model of a run that stands in runs/tiny, and have its seed:

python -m training run tiny --run runs/tiny seed=4
python -m training run tiny-controls --run runs/controls seed=4
python -m bench pipeline runs/controls --out bench/results/cpu/tiny-controls.json
"""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training import files
from training.format import percent
from training.pipeline import STAGES
from training.recipe import Recipe
from training.report import students
from training.report.marks import MARKS, marks_of
from training.run_dir import RunDir

from .. import results
from ..table import Table

MODELS = (
    ("judge (against the rule)", "judge", "agreement"),
    ("helpful model (pairs)", "reward_models", "helpful/accuracy"),
    ("safety model", "reward_models", "safety/accuracy"),
)
SPLITS = ("test", "harder", "hardest")
COLUMNS = (*MARKS, ("pass@1", "pass@1"), ("greedy", "greedy"))


def finished(run_dir: RunDir) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run, and the record of each of its stages, in their order.

    Raises:
        SystemExit: a stage has not run.
    """
    recipe = run_dir.read_recipe()
    records = {name: run_dir.stage(name).record() for name in STAGES if name in recipe.stages}
    done = {name: record for name, record in records.items() if record is not None}
    missing = [name for name in records if name not in done]
    if missing:
        text = ", nor has ".join([f"{missing[0]} has not run", *missing[1:]])
        raise SystemExit(f"{run_dir.path}: expected a finished run, but {text}")
    return recipe, done


def collect(folder: Path) -> dict[str, Any]:
    """One run: its recipe and seed, marks on the test split and the harder level, final metrics, times and memory."""
    run_dir = RunDir(folder)
    recipe, done = finished(run_dir)
    made_by = files.read_json(run_dir.stage("evaluate").data("lineage.json"))
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "threads": recipe.threads,
        **{split: {name: kept(row) for name, row in marks_of(run_dir, split).items()} for split in SPLITS},
        "students": [four_digits(student._asdict()) for student in students.learnt(run_dir)],
        "rewarded": rewarded(run_dir, recipe),
        "final_metrics": {
            name: final(record["metrics"], recipe) for name, record in done.items() if name != "evaluate"
        },
        "stage_seconds": {name: round(record["stage_seconds"], 1) for name, record in done.items()},
        "total_seconds": round(sum(record["stage_seconds"] for record in done.values()), 1),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in done.values()),
        "versions": {key: made_by[key] for key in ("code", "packages")},
    }


def rewarded(run_dir: RunDir, recipe: Recipe) -> int:
    """How many responses R1-Zero was rewarded for as right, over all its steps."""
    rows = run_dir.stage("zero").metrics()
    return round(sum(row.get("accuracy", 0.0) for row in rows) * recipe.zero.prompts * recipe.zero.group_size)


def final(metrics: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The last metrics of a stage, four digits of each; those of students are kept with the students."""
    of_stage = {key: v for key, v in metrics.items() if key.split("/")[0] not in recipe.distill.students}
    return four_digits(of_stage)


def four_digits(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: results.short(value) if isinstance(value, float) else value for key, value in row.items()}


def kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the marks of a checkpoint: four digits, and pass@k where k is a power of two; not whose marks they are."""
    marks = {key: value for key, value in row.items() if key not in ("checkpoint", "split", "language")}
    found = rounded(marks, 4)
    if "reach" in row:
        powers = {str(2**power) for power in range(10)}
        found["reach"] = {k: round(share, 4) for k, share in row["reach"].items() if k in powers}
    return found


def rounded(row: Mapping[str, Any], places: int) -> dict[str, Any]:
    return {key: round(value, places) if isinstance(value, float) else value for key, value in row.items()}


def measure(runs: Sequence[Path]) -> dict[str, Any]:
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {"machine": machine, "runs": [collect(folder) for folder in runs]}


def of_runs(texts: Iterable[str]) -> str:
    return " / ".join(texts)


def rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A row per checkpoint, each cell the marks of all runs."""
    found = []
    for checkpoint in runs[0]["test"]:
        marks = [run["test"].get(checkpoint, {}) for run in runs]
        found.append([checkpoint, *(of_runs(percent(one.get(key)) for one in marks) for key, _ in COLUMNS)])
    return found


def levels(record: Mapping[str, Any]) -> Table:
    """A row per split and checkpoint that was asked many times; each cell what it is in all runs."""
    shown = ("greedy", "at temperature 1", "pass@8", "pass@32", "tokens of a response")
    found = Table("Levels", ("split", "checkpoint", "problems", *shown))
    for split in SPLITS:
        for checkpoint, first in record["runs"][0][split].items():
            marks = [run[split][checkpoint] for run in record["runs"]]
            if any("reach" not in one for one in marks):
                continue
            shares = [
                [one["greedy"], one["accuracy"], one["reach"]["8"], one["reach"]["32"]] for one in marks
            ]
            cells = [of_runs(map(percent, each)) for each in zip(*shares, strict=True)]
            lengths = of_runs(f"{one['length']:.0f}" for one in marks)
            found.rows.append([split, checkpoint, str(first["problems"]), *cells, lengths])
    return found


def methods(record: Mapping[str, Any]) -> Table:
    """A row per student of those that learn by different methods at equal tokens; each cell what it is in all runs."""
    # records of earlier runs do not tell
    runs = [[students.Learnt(**each) for each in run.get("students", ())] for run in record["runs"]]
    found = Table("Methods at equal tokens", ("begins with", "learns by", "tokens", "seconds", "accuracy, %"))
    for first in (one for group in students.at_equal_tokens(runs[0]) for one in group):
        every = [next(one for one in run if one.name == first.name) for run in runs]
        shown = [(f"{one.tokens:,}", f"{one.seconds:.0f}", percent(one.accuracy)) for one in every]
        found.rows.append([first.beginning, first.method, *map(of_runs, zip(*shown, strict=True))])
    return found


def controls(record: Mapping[str, Any], controlled: Mapping[str, Any]) -> Table:
    """What the same base model became, by R1-Zero in a run of `record` and by the controls: greedy, at temperature 1, pass@32."""
    (control,) = controlled["runs"]
    (run,) = [each for each in record["runs"] if each["seed"] == control["seed"]]
    (own,) = control["students"]
    learnt = [
        ("base", run, "base", "-"),
        ("R1-Zero", run, "zero", f"{run['rewarded']:,}"),
        ("GRPO with a coin for a reward", control, "zero", "0"),
        (
            "SFT on the base model's own right responses",
            control,
            f"distill-{own['name']}",
            f"{own['epochs'] * control['final_metrics']['distill']['kept']:,}",
        ),
    ]
    found = []
    for title, one, checkpoint, right in learnt:
        marks = [one[split][checkpoint] for split in SPLITS]
        shares = [(mark["greedy"], mark["accuracy"], mark["reach"]["32"]) for mark in marks]
        found.append([title, right, *(of_runs([percent(share) for share in each]) for each in shares)])
    return Table("Controls", ("model", "right responses learnt from", *SPLITS), found)


def tables(record: Mapping[str, Any]) -> list[Table]:
    """A row per checkpoint, each cell the marks of all runs in % of the held-out problems; then the judge and the reward models."""
    runs = record["runs"]
    first = next(iter(runs[0]["test"].values()))
    note = (
        f"Recipe `{runs[0]['recipe']}`, seeds {of_runs(str(run['seed']) for run in runs)}, {first['problems']:,} held-out "
        f"problems, one sample each at temperature 1, in %; pass@1 is the mean of {first['k']} at temperature 0.6, top-p 0.95. "
        f"{of_runs(format(run['total_seconds'] / 60, '.1f') for run in runs)} minutes on {record['machine']['cores']} cores, "
        f"{max(run['peak_memory_bytes'] for run in runs) / 2**30:.1f} GiB at most."
    )
    found = Table("Checkpoints", ("checkpoint", *(title for _, title in COLUMNS)), rows(runs), note)
    right = [
        f"{title} {of_runs(percent(run['final_metrics'][stage][metric]) for run in runs)}"
        for title, stage, metric in MODELS
        if stage in runs[0]["final_metrics"]
    ]
    said = Table("Models", (), note=f"Right on held-out responses, in %: {', '.join(right)}.")
    return [found, said] if right else [found]
