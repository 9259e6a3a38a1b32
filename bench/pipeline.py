"""The marks of whole pipeline runs, collected into one committed file, and its table for the README.

python -m training run tiny --run runs/tiny-0 seed=0
python -m training run tiny --run runs/tiny-1 seed=1
python -m bench.pipeline runs/tiny-0 runs/tiny-1 --out bench/results/cpu/tiny.json
python -m bench.pipeline --table bench/results/cpu/tiny.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training import files
from training.format import percent
from training.pipeline import STAGES
from training.report.marks import MARKS, marks_of
from training.run_dir import RunDir

MODELS = (
    ("judge (against the rule)", "judge", "agreement"),
    ("helpful model (pairs)", "reward_models", "helpful/accuracy"),
    ("safety model", "reward_models", "safety/accuracy"),
)
COLUMNS = (*MARKS, ("pass@1", "pass@1"), ("greedy", "greedy"))


def collect(folder: Path) -> dict[str, Any]:
    """One run: its recipe and seed, marks on the test split and the harder level, final metrics, times and memory."""
    run_dir = RunDir(folder)
    recipe = run_dir.read_recipe()
    records = {name: run_dir.stage(name).record() for name in STAGES if name in recipe.stages}
    done = {name: record for name, record in records.items() if record is not None}
    missing = sorted(set(records) - set(done))
    if missing:
        raise SystemExit(f"{folder}: expected a finished run, but {', '.join(missing)} has not run")
    made_by = files.read_json(run_dir.stage("evaluate").data("lineage.json"))
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "threads": recipe.threads,
        "test": marks_of(run_dir),
        "harder": marks_of(run_dir, split="harder"),
        "hardest": marks_of(run_dir, split="hardest"),
        "final_metrics": {name: record["metrics"] for name, record in done.items() if name != "evaluate"},
        "stage_seconds": {name: round(record["stage_seconds"], 1) for name, record in done.items()},
        "total_seconds": round(sum(record["stage_seconds"] for record in done.values()), 1),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in done.values()),
        "versions": {key: made_by[key] for key in ("code", "packages")},
    }


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row per checkpoint, each cell the marks of all runs in % of the held-out problems."""
    runs: Sequence[Mapping[str, Any]] = results["runs"]
    titles = ["checkpoint", *(title for _, title in COLUMNS)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for checkpoint in runs[0]["test"]:
        cells = [
            " / ".join(percent(run["test"].get(checkpoint, {}).get(key)) for run in runs)
            for key, _ in COLUMNS
        ]
        lines.append(f"| {checkpoint} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(results: Mapping[str, Any]) -> str:
    """Seeds, problems, times and memory, in words."""
    runs = results["runs"]
    problems = next(iter(runs[0]["test"].values()))["problems"]
    seeds = " / ".join(str(run["seed"]) for run in runs)
    minutes = " / ".join(f"{run['total_seconds'] / 60:.1f}" for run in runs)
    memory = max(run["peak_memory_bytes"] for run in runs) / 2**30
    return (
        f"Recipe `{runs[0]['recipe']}`, seeds {seeds}, {problems:,} held-out problems, one sample each at temperature 1, "
        f"in %; pass@1 is the mean of {next(iter(runs[0]['test'].values()))['k']} at temperature 0.6, top-p 0.95. "
        f"{minutes} minutes on {results['machine']['cores']} cores, {memory:.1f} GiB at most."
    )


def models(results: Mapping[str, Any]) -> str:
    """One sentence: how often the judge and the reward models are right on held-out responses."""
    parts = []
    for title, stage, metric in MODELS:
        shares = [percent(run["final_metrics"][stage][metric]) for run in results["runs"]]
        parts.append(f"{title} {' / '.join(shares)}")
    return "Right on held-out responses, in %: " + ", ".join(parts) + "."


def machine() -> dict[str, Any]:
    """What the runs were made on, as far as it bears on the numbers."""
    return {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs of one recipe")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--table", type=Path, help="print the Markdown table of a JSON file")
    arguments = parser.parse_args()
    if arguments.table:
        results = json.loads(arguments.table.read_text())
    else:
        if not arguments.runs:
            parser.error("runs: expected at least one folder, or --table FILE")
        results = {"machine": machine(), "runs": [collect(folder) for folder in arguments.runs]}
        if arguments.out:
            files.write_json(arguments.out, results)
    print(f"{summary(results)}\n\n{table(results)}\n\n{models(results)}")


if __name__ == "__main__":
    main()
