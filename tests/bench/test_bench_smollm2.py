"""What is said of SmolLM2 is what its committed runs hold, and R1-Zero taught it something."""

import pytest

from bench.studies import smollm2
from training import files, pipeline
from training.progress import Progress
from training.recipe import load, to_dict
from training.run_dir import RunDir


def marks(**changes):
    row = {
        "checkpoint": "base",
        "split": "test",
        "language": "all",
        "problems": 512,
        "accuracy": 0.25,
        "wilson_low": 0.2144,
        "wilson_high": 0.2893,
        "greedy": 0.5,
        "greedy_low": 0.45,
        "greedy_high": 0.55,
        "greedy_problems": 384,
        "format": 0.75,
        "language_consistency": 0.5,
        "length": 20.06,
    }
    return {**row, **changes}


def test_a_row_has_shares_with_their_intervals():
    found = smollm2.marks_table({"marks": [marks(), marks(split="harder")]}).markdown().splitlines()
    assert found[0] == "| checkpoint | right at temperature 1, n = 512 | greedy, n = 384 | format | tokens |"
    assert found[2:] == ["| base | 25.0 (21.4 to 28.9) | 50.0 (45.0 to 55.0) | 75.0 | 20.1 |"]


def test_several_languages_have_a_row_each():
    table = smollm2.marks_table(
        {"marks": [marks(), marks(language="zh", problems=170), marks(language="en")]}
    )
    assert "greedy" not in str(table.head) and table.rows[1][-2] == "50.0 (42.6 to 57.4)"
    assert [row[1] for row in table.rows] == ["all (512)", "Chinese (170)", "English (512)"]


def test_r1_zero_taught_the_pretrained_model_something():
    """In at least 100 steps, on at least 512 problems, with intervals that do not overlap."""
    record = smollm2.load("zero")
    before, after = smollm2.marks(record, "base"), smollm2.marks(record, "zero")
    assert len(smollm2.metrics("zero", "zero")) >= 100
    assert min(after["problems"], after["greedy_problems"]) >= 512
    assert before["wilson_high"] < after["wilson_low"] and before["greedy_high"] < after["greedy_low"]


def test_the_language_reward_keeps_the_language_of_the_question():
    """In at least 40 steps, on at least 256 problems of each language; R1-Zero, which was not rewarded for it, mixed them."""
    of = {
        (row["checkpoint"], row["language"]): row
        for row in smollm2.load("languages")["marks"]
        if row["split"] == "test"
    }
    assert len(smollm2.metrics("languages", "rl_reasoning")) >= 40
    for language in ("en", "de", "zh"):
        before, after = of["sft1", language], of["rl_reasoning", language]
        assert min(before["problems"], after["problems"]) >= 256
        assert before["language_consistency"] <= after["language_consistency"] > 0.95
    assert of["zero", "all"]["language_consistency"] < 0.5


def test_students_of_the_pretrained_model_learn_what_r1_zero_taught_their_teacher():
    """By each method, at equal tokens: intervals above that of the model they begin as, and not below the teacher's."""
    record, of = smollm2.load("student"), smollm2.load("zero")
    base, teacher = smollm2.marks(of, "base"), smollm2.marks(of, "zero")
    assert {each["method"] for each in record["students"]} == {"sft", "logits", "on_policy"}
    learnt = [each["tokens"] for each in record["students"]]
    assert max(learnt) < 1.05 * min(learnt)
    for each in record["students"]:
        row = smollm2.marks(record, f"distill-{each['name']}")
        assert row["problems"] >= 512 and row["wilson_low"] > base["wilson_high"]
        assert row["wilson_high"] > teacher["wilson_low"]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("zero", "smollm2"), ("languages", "smollm2-languages"), ("student", "smollm2-student")],
)
def test_the_committed_run_is_that_of_the_recipe(name, recipe):
    made, wanted = to_dict(load(smollm2.FOLDER / name / "recipe.yaml")), to_dict(load(recipe))
    for key in (
        "task",
        "task_options",
        "dtype",
        "seed",
        "cold_start",
        "sft1",
        "rl_reasoning",
        "zero",
        "distill",
        "evaluate",
    ):
        assert made[key] == wanted[key], key


def test_committed_files_are_small_and_name_no_path():
    for path in smollm2.FOLDER.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert len(text) < 300_000, path
        assert "/tmp" not in text and "/root" not in text and "/home" not in text, path


def test_the_time_of_a_step_is_that_of_the_median_step():
    rows = [{"rollout_seconds": 2.0, "update_seconds": 1.0}] * 2 + [
        {"rollout_seconds": 2.0, "update_seconds": 99.0}
    ]
    assert smollm2.times(rows).startswith("3.0 s a step (medians): 2.0 s rollout")


def test_a_curve_is_a_mean_over_the_last_steps(monkeypatch):
    monkeypatch.setattr(smollm2, "WINDOW", 2)
    rows = [{"accuracy": value, "reward/accuracy": value} for value in (0.0, 1.0, 0.5)]
    assert smollm2.curve(rows)["right"] == {"0": 0.0, "1": 0.5, "2": 0.75}


def test_a_run_is_kept_without_its_weights(tmp_path, monkeypatch):
    """Of a run of one step of a tiny model; what its report shows is not looked at here."""
    monkeypatch.setattr(smollm2, "write_report", lambda run_dir, path: path.write_text(run_dir.path.name))
    words = [
        "model.layers=2",
        "base.steps=1",
        "base.batch_size=4",
        "zero.steps=1",
        "zero.prompts=2",
        "zero.group_size=2",
    ]
    words += [
        "evaluate.problems=4",
        "evaluate.k_problems=2",
        "evaluate.k=1",
        "evaluate.max_new_tokens=2",
        "stages=[base,zero,evaluate]",
    ]
    pipeline.run(load("smoke", words), RunDir(tmp_path / "run"), progress=Progress(quiet=True))
    smollm2.collect(tmp_path / "run", tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "metrics.jsonl",
        "recipe.yaml",
        "record.json",
        "report.html",
        "samples.jsonl",
    }
    record = files.read_json(tmp_path / "kept/record.json")
    assert smollm2.marks(record, "zero")["problems"] == 4
    (step,) = files.read_jsonl(tmp_path / "kept/metrics.jsonl")
    assert step["stage"] == "zero" and step["step"] == 0
