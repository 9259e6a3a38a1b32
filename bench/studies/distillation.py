"""What students learn from a teacher's text, from its distribution of it, and on policy.

run is a finished run of the recipe `tiny`: its last policy is the teacher, and the responses that its distillation kept are the text.
Each method learns the tokens of EPOCHS epochs over that, from random weights and from a student that has learnt the text for START
epochs before.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.context import StageContext
from training.progress import Progress
from training.recipe import load
from training.report.students import seconds
from training.run_dir import RunDir, StageDir
from training.stages import distill

from ..table import Table

METHODS = ("sft", "logits", "on_policy")
EPOCHS, START, MORE = 5, 12, 6
SIZES = "architecture: qwen2, hidden_size: 64, layers: 2, heads: 4, intermediate_size: 192"
SHOWN = ("learnt", "steps", "loss", "accuracy")


def train(run: Path, folder: Path, method: str, epochs: int, start: Path | None = None) -> dict[str, Any]:
    """What became of one student, whose checkpoint is put into ``folder``. start: the checkpoint that it goes on from."""
    name = method.replace("_", "")
    pretrained = "" if start is None else f', pretrained: "{start}"'
    sizes = f"{SIZES}, epochs: {epochs}, batch_size: 64, lr: 3e-3, lr_end: 3e-4, save_every: 0{pretrained}"
    recipe = load("tiny", [f"distill.students={{{name}: {{{sizes}, method: {method}}}}}"])
    stage, before = StageDir(folder), RunDir(run)
    stage.begin({}, {})
    for data in ("data.jsonl", "counts.jsonl"):
        shutil.copy(before.stage("distill").data(data), folder / data)
    inputs = {parent: before.stage(parent) for parent in ("rl_all", "rejection")}
    context = StageContext("distill", recipe, recipe.distill, stage, inputs, Progress())
    metrics = distill.run(context)
    shown = {key: metrics[f"{name}/{key}"] for key in SHOWN}
    return {"method": method, "epochs": epochs, **shown, "seconds": round(seconds(stage.metrics()), 1)}


def measure(run: Path) -> dict[str, Any]:
    """A row a student."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [{"start": 0, **train(run, folder / method, method, EPOCHS)} for method in METHODS]
        rows.append({"start": 0, **train(run, folder / "start", "sft", START)})
        begun = folder / "start" / "checkpoint-sft"
        for method in METHODS:
            more = train(run, folder / f"more_{method}", method, MORE, begun)
            rows.append({"start": START, **more})
    return {"recipe": "tiny", "rows": rows}


def tables(record: Mapping[str, Any]) -> list[Table]:
    """A row a student: what it began with and learnt, tokens, seconds and the accuracy that came of it."""
    found = Table("Students", ("begins with", "learns by", "tokens", "seconds", "steps", "accuracy"))
    for row in record["rows"]:
        began = f"{row['start']} epochs of sft" if row["start"] else "random weights"
        accuracy = f"{100 * row['accuracy']:.1f} %"
        spent = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        found.rows.append([began, row["method"], f"{row['learnt']:,}", spent, f"{row['steps']:,}", accuracy])
    return [found]
