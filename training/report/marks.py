"""The marks of the checkpoints, read from evaluation.jsonl."""

import math
from typing import Any

from training.run_dir import RunDir

# Name in evaluation.jsonl, title of the column.
MARKS = (
    ("accuracy", "accuracy"),
    ("format", "format"),
    ("language_consistency", "language"),
    ("helpful", "helpful"),
    ("harmless", "harmless"),
)
MORE_MARKS = (("greedy", "greedy"), ("pass@1", "pass@1"), ("maj@k", "maj@k"), ("pass@k", "pass@k"))


def evaluation_rows(run_dir: RunDir) -> list[dict[str, Any]]:
    """All rows of the evaluation; empty before it has run."""
    stage = run_dir.stage("evaluate")
    return stage.read_data("evaluation.jsonl") if stage.data("evaluation.jsonl").is_file() else []


def marks_of(run_dir: RunDir, split: str = "test", language: str = "all") -> dict[str, dict[str, Any]]:
    """Checkpoint -> its row of a split and language, in the order of the evaluation."""
    return {
        row["checkpoint"]: row
        for row in evaluation_rows(run_dir)
        if row["split"] == split and row["language"] == language
    }


def number(value: Any) -> float | None:
    """`value` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
