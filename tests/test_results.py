"""What README shows as measured is what the committed results hold."""

import json
from pathlib import Path

from bench.studies import pipeline
from training.report import students

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/cpu/tiny.json"


def test_the_table_of_the_readme_is_that_of_the_committed_runs():
    readme = (ROOT / "README.md").read_text()
    checkpoints, models = pipeline.tables(json.loads(RESULTS.read_text()))
    assert len(checkpoints.rows) >= 8
    assert checkpoints.markdown() in readme and models.markdown() in readme


def test_a_row_shows_all_runs_and_a_dash_where_nothing_was_measured():
    row = {name: 0.5 for name, _ in pipeline.COLUMNS} | {"problems": 8, "k": 4}
    runs = [
        {"test": {"base": {**row, "accuracy": 0.253, "helpful": None}}},
        {"test": {"base": {**row, "accuracy": 1.0}}},
    ]
    (row,) = pipeline.rows(runs)
    assert row[:3] == ["base", "25.3 / 100.0", "50.0 / 50.0"]
    assert "- / 50.0" in row


def test_methods_of_all_runs_stand_in_one_row():
    def student(name, method, beginning, tokens, accuracy):
        told = (name, method, beginning, 3, tokens, 10, 5.0, 0.1, accuracy, None, None)
        return students.Learnt(*told)._asdict()

    runs = [
        {"students": [student("a", "sft", "b", 900, 0.5), student("c", "logits", "b", 901, accuracy)]}
        for accuracy in (0.75, 0.8)
    ]
    table = pipeline.methods({"runs": runs})
    assert table.rows[1] == ["b", "logits", "901 / 901", "5 / 5", "75.0 / 80.0"]
    assert pipeline.methods({"runs": [{"test": {}}]}).rows == []  # a record that does not tell


def test_controls_stand_beside_the_run_of_their_seed():
    def marks(greedy):
        return {"greedy": greedy, "accuracy": 0.5, "reach": {"32": 1.0}}

    def splits(**greedy):
        return {split: {name: marks(value) for name, value in greedy.items()} for split in pipeline.SPLITS}

    tiny = [{"seed": seed, "rewarded": 12000, **splits(base=0.0, zero=0.9 + seed / 100)} for seed in (4, 5)]
    own = [{"name": "own", "epochs": 2}]
    coin = {"seed": 5, "students": own, "final_metrics": {"distill": {"kept": 6000}}}
    coin |= splits(**{"zero": 0.01, "distill-own": 0.25})
    rows = pipeline.controls({"runs": tiny}, {"runs": [coin]}).rows
    assert [row[1] for row in rows] == ["-", "12,000", "0", "12,000"]
    assert [row[4] for row in rows] == [
        f"{greedy} / 50.0 / 100.0" for greedy in ("0.0", "95.0", "1.0", "25.0")
    ]
