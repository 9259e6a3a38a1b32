"""What is said of SmolLM2 is what its committed runs hold, and R1-Zero taught it something."""

import pytest

from bench import documents, smollm2
from training import files
from training.recipe import load


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
    found = smollm2.table({"marks": [marks(), marks(split="harder")]}).splitlines()
    assert found[0] == "| checkpoint | right at temperature 1, n = 512 | greedy, n = 384 | format | tokens |"
    assert found[2:] == ["| base | 25.0 (21.4 to 28.9) | 50.0 (45.0 to 55.0) | 75.0 | 20.1 |"]


def test_several_languages_have_a_row_each():
    found = smollm2.table({"marks": [marks(), marks(language="zh", problems=170), marks(language="en")]})
    assert [line.split(" | ")[1] for line in found.splitlines()[2:]] == [
        "all (512)",
        "Chinese (170)",
        "English (512)",
    ]


def test_r1_zero_taught_the_pretrained_model_to_add():
    """In at least 100 steps, on at least 512 problems, with intervals that do not overlap."""
    record = smollm2.load("smollm2")
    before, after = (
        next(row for row in record["marks"] if row["checkpoint"] == name) for name in ("base", "zero")
    )
    assert len(smollm2.metrics("smollm2", "zero")) >= 100
    assert min(after["problems"], after["greedy_problems"]) >= 512
    assert before["wilson_high"] < after["wilson_low"] and before["greedy_high"] < after["greedy_low"]


@pytest.mark.parametrize("name", smollm2.RECIPES)
def test_the_committed_runs_are_those_of_the_recipes(name):
    if not (smollm2.FOLDER / smollm2.RECIPES[name]).is_dir():
        pytest.skip("not measured")
    record, recipe = smollm2.load(name), load(name)
    assert record["recipe"] == name
    for stage in ("zero", "rl_reasoning"):
        if stage in recipe.stages:
            assert len(smollm2.metrics(name, stage)) == getattr(recipe, stage).steps
    (all_, *_) = (row for row in record["marks"] if row["language"] == "all")
    assert all_["problems"] == recipe.evaluate.problems


def test_committed_files_are_small_and_name_no_path():
    for path in smollm2.FOLDER.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert len(text) < 500_000, path
        assert "/tmp" not in text and "/root" not in text and "/work" not in text, path


def test_a_run_is_collected_without_its_weights(tmp_path):
    files.write_jsonl(tmp_path / "a.jsonl", [{"stage": "zero"}])
    assert documents.ROOT == smollm2.FOLDER.parents[3]
