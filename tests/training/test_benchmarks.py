"""`evaluate --benchmark`: EleutherAI's lm-eval on a checkpoint, with a task whose data lie on this machine."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.own_models import write_folder
from training import benchmarks
from training.checkpoint import load_model
from training.cli import main
from training.errors import UserError

manager = pytest.importorskip("lm_eval.tasks.manager", reason="lm-eval is not installed: pip install lm-eval")

CHOICES = [" 46", " the answer", " paris", " clips"]
ROWS = [{"question": f"What is {n} plus 1?", "choices": CHOICES, "answer": n % 4} for n in range(6)]
TASK = """
task: my_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: !function my_answer.right
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and a task with its data."""
    folder = tmp_path_factory.mktemp("bench")
    write_folder(folder / "own", "qwen2")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "my.yml").write_text(TASK.format(data=folder / "rows.jsonl"))
    (folder / "my_answer.py").write_text("def right(row):\n    return row['answer']\n")
    return folder


def by_hand(model, tokenizer):
    """Share of the rows whose right choice has the largest log-prob behind its question."""
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            before = tokenizer.encode(row["question"])
            whole = tokenizer.encode(row["question"] + choice)
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            taken = logp.gather(1, torch.tensor(whole[1:])[:, None])[len(before) - 1 :]
            scores.append(float(taken.sum()))
        right += max(range(4), key=scores.__getitem__) == row["answer"]
    return right / len(ROWS)


def test_a_task_of_ones_own_gets_the_score_that_a_person_computes(place, tmp_path, capsys):
    words = ["evaluate", "--model", str(place / "own"), "--benchmark", f"lm-eval:{place / 'my.yml'}"]
    assert main([*words, "--out", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["task"] == "my_choices" and row["samples"] == len(ROWS)
    assert row["metrics"]["acc,none"] == pytest.approx(by_hand(*load_model(place / "own")))
    assert "my_choices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("gsm8k", "--benchmark: expected lm-eval:TASK"),
        ("lm-eval:", "--benchmark: expected lm-eval:TASK"),
        ("lm-eval:none.yaml", "--benchmark: there is no file none.yaml"),
    ],
)
def test_a_mistake_is_one_line(spec, text):
    with pytest.raises(UserError, match=f"^{text}"):
        benchmarks.check(spec)


def test_an_unknown_task_names_the_nearest_one(place, monkeypatch, capsys):
    """Among the tasks of one folder of lm-eval: all thousands of them take seconds to read."""
    monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "gsm8k/manager.py"))
    monkeypatch.setattr(benchmarks, "_known", benchmarks._known.__wrapped__)
    assert main(["evaluate", "--model", str(place / "own"), "--benchmark", "lm-eval:gsm8kk"]) == 2
    assert "unknown task of lm-eval 'gsm8kk': did you mean 'gsm8k" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a: [1", "a: 1", "- 1", "group: mine\ntask: [gsm8k]"])
def test_a_file_that_is_no_task_is_one_line(text, place, tmp_path, capsys):
    (tmp_path / "task.yaml").write_text(text)
    spec = f"lm-eval:{tmp_path / 'task.yaml'}"
    assert main(["evaluate", "--model", str(place / "own"), "--benchmark", spec]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"{spec}: this is no task of lm-eval: " in line


def test_data_beside_a_benchmark_are_refused(place, capsys):
    words = ["evaluate", "--model", str(place / "own"), "--data", "q.jsonl", "--benchmark", "lm-eval:gsm8k"]
    assert main(words) == 2
    assert "a benchmark has data and settings of its own" in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("training.optional.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package lm-eval: pip install lm-eval$"):
        benchmarks.check("lm-eval:gsm8k")
