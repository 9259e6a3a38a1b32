"""What a person brings as files: tasks of their own, and data that count by their content."""

import json
from dataclasses import replace

import pytest

from tests.support.own_models import write_folder
from training import pipeline, responses, rewards
from training.check import check
from training.errors import UserError
from training.own_process import MOST_FAULTS
from training.pipeline import Stage
from training.progress import Progress
from training.recipe import load, make, stage_config
from training.response import parse
from training.run_dir import RunDir
from training.tasks import get_task
from training.tasks.own import NOT_ASKED

TASK = """
from dataclasses import dataclass, replace
from beside import EXTRA
from training.tasks.problem import Problem

@dataclass
class Doubling:
    size: int = 5
    name = "mine"

    def problems(self, split):
        first = {"train": 0, "test": 100, "harder": 200}[split]
        return [
            Problem(f"double-{n}", "", "reasoning", "fr", f"{n} + {n}", str(2 * n), meta={"extra": EXTRA})
            for n in range(first, first + self.size)
        ]

    def check(self, problem, answer):
        return answer.strip() == problem.reference

class NoCheck:
    def problems(self, split):
        return []

class Overlapping(Doubling):
    def problems(self, split):
        return super().problems("train")

class Renamed(Overlapping):
    def problems(self, split):
        return [replace(each, id=f"{split}-{each.id}") for each in super().problems(split)]
"""


@pytest.fixture
def task_file(tmp_path):
    (tmp_path / "beside.py").write_text("EXTRA = 7\n")
    path = tmp_path / "my_task.py"
    path.write_text(TASK)
    return path


def test_a_task_of_ones_own(task_file):
    task = get_task(f"python:{task_file}:Doubling", size=3)
    problems = task.problems("train")
    assert [problem.question for problem in problems] == ["0 + 0", "1 + 1", "2 + 2"]
    assert {problem.task for problem in problems} == {task.name} and problems[0].meta["extra"] == 7
    assert task.check(problems[2], " 4 ") and not task.check(problems[2], "5")
    assert task.worked_examples("fr") == [] and task.dictionary("fr") == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing.py:Doubling", "there is no file nothing.py"),
        ("FILE", "expected python:<file>:<name>"),
        ("FILE:Dubling", "has no 'Dubling'"),
        ("FILE:NoCheck", "expected a class with the method 'check'"),
        ("FILE:Overlapping", "'double-0' or its question is in train and in test"),
        ("FILE:Renamed", "'test-double-0' or its question is in train and in test"),
    ],
)
def test_a_task_that_is_none_is_named(task_file, spec, message):
    with pytest.raises(UserError, match=message):
        get_task("python:" + spec.replace("FILE", str(task_file))).problems("test")


def test_an_option_that_the_class_does_not_know_and_a_file_that_breaks(task_file):
    with pytest.raises(UserError, match="unexpected keyword argument 'length'"):
        get_task(f"python:{task_file}:Doubling", length=3)
    task_file.write_text("raise RuntimeError('no')")
    with pytest.raises(UserError, match="cannot be imported: RuntimeError: no"):
        get_task(f"python:{task_file}:Doubling")


CHECKS = """
import os, time
from training.tasks.problem import Problem

class Sign:
    def __eq__(self, other):
        return isinstance(other, Sign)

class Fragile:
    def problems(self, split):
        return [Problem(f"{split}-1", "", "reasoning", "en", f"{split}?", "yes", meta={"sign": Sign()})]

    def check(self, problem, answer):
        match answer:
            case "hang": time.sleep(60)
            case "die": os._exit(3)
            case "raise": raise ValueError("no")
        return answer == problem.reference and problem.meta["sign"] == Sign()
"""


def test_a_check_that_raises_hangs_or_dies_is_an_error_of_that_answer_alone(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(CHECKS)
    recipe = make({"task": [f"python:{path}:Fragile"], "reward_seconds": 3.0})
    (task,) = responses.tasks(recipe).values()
    (problem,) = task.problems("train")

    def judged(answer):
        text = f"<think> so </think> <answer> {answer} </answer>"
        reward = rewards.accuracy(rewards.Sample(problem, text, parse(text), (1,)), task)
        return reward.value, reward.reason

    assert judged("yes") == (1.0, "right")
    assert judged("raise") == (None, "error: ValueError: no")
    assert judged("hang") == (None, "error: it took longer than 3 s")
    assert judged("die") == (None, "error: its process died")
    assert judged("no")[0] == 0.0
    for _ in range(MOST_FAULTS):
        assert judged("die") == (None, "error: its process died")
    assert judged("yes") == (None, "error: not asked after 3 checks that hung or died")
    for _ in range(NOT_ASKED - 1):
        assert judged("yes")[0] is None
    assert judged("yes") == (1.0, "right")


def test_code_counts_with_what_it_imports_beside_it(tmp_path):
    task = tmp_path / "my_task.py"
    task.write_text("import json, helpers.inner\nfrom beside import EXTRA\n" + CHECKS)
    (tmp_path / "beside.py").write_text("import deeper\nEXTRA = 7\n")
    (tmp_path / "deeper.py").write_text("import beside\n")
    (tmp_path / "json.txt").write_text("")
    (tmp_path / "stranger.py").write_text("")
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "inner.py").write_text("")
    recipe = make({"task": [f"python:{task}:Fragile"], "stages": ["zero"]})

    def found():
        return stage_config(recipe, "zero")["files"]

    seen = [found()]
    for name in ("my_task.py", "beside.py", "deeper.py", "helpers/inner.py"):
        path = tmp_path / name
        path.write_text(path.read_text() + "# edited\n")
        assert found() not in seen, name
        seen.append(found())
    (tmp_path / "stranger.py").write_text("# edited\n")
    assert found() == seen[-1]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n} + 1", "answer": n + 1}) + "\n" for n in range(30)))
    return replace(load("smoke", ["stages=[base, zero]"]), task=[f"jsonl:{path}"])


def test_a_file_is_read_once_until_it_changes(recipe, tmp_path):
    first = responses.tasks(recipe)
    assert responses.tasks(recipe)[recipe.task[0]] is first[recipe.task[0]]
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1", "answer": 2}')
    assert len(responses.problems(recipe, "train", ("reasoning",))) <= 1


def test_a_problem_of_two_files_counts_once_and_two_problems_of_one_id_are_refused(recipe, tmp_path):
    alone = responses.problems(recipe, "train", ("reasoning",))
    copy = tmp_path / "copy.jsonl"
    copy.write_text((tmp_path / "data.jsonl").read_text())
    both = replace(recipe, task=[*recipe.task, f"jsonl:{copy}"])
    assert responses.problems(both, "train", ("reasoning",)) == alone
    for path in (copy, tmp_path / "data.jsonl"):
        path.write_text(json.dumps({"question": path.name, "answer": 1, "id": "one", "level": "harder"}))
    with pytest.raises(UserError, match="have different problems of the id 'one'"):
        responses.problems(both, "harder", ("reasoning",))


def test_the_content_of_a_file_is_in_the_settings_of_the_stages_that_read_it(recipe, tmp_path):
    before = {stage: stage_config(recipe, stage) for stage in ("base", "zero", "sft1", "evaluate")}
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1", "answer": 2}')
    changed = {stage for stage, config in before.items() if stage_config(recipe, stage) != config}
    assert changed == {"zero", "evaluate"}
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(UserError, match="data.jsonl cannot be read: No such file"):
        stage_config(recipe, "zero")


def test_an_edited_file_makes_the_stages_that_read_it_run_again_and_no_other(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "run", lambda stage, context: {})
    run_dir = RunDir(tmp_path / "run")

    def run(**options):
        return pipeline.run(recipe, run_dir, progress=Progress(quiet=True), **options)

    assert run() == ["base", "zero"] and run() == []
    path = tmp_path / "data.jsonl"
    path.write_text(path.read_text().replace('"answer": 7', '"answer": 8'))
    with pytest.raises(
        UserError, match=r"stage zero read jsonl:\S+, whose content has changed since: .*--redo zero"
    ):
        run()
    assert run(redo=["zero"]) == ["zero"]
    record = json.loads((run_dir.path / "zero" / "lineage.json").read_text())
    assert set(record["config"]["files"]) == set(recipe.task)


REWARDS = """
def short(sample):
    if sample.token_ids[0] % 2:
        raise ValueError("odd")
    return -len(sample.token_ids) / 10
"""


def test_zero_on_ones_own_model_data_reward_and_form_of_the_answer(tmp_path):
    folder = write_folder(tmp_path / "own", "qwen2", template="chatml_think")
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text(REWARDS)
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{n} + 1", "answer": rf"\\boxed{{{n + 1}}}", "language": "haw"} for n in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"python:{rewards}:short"
    recipe = make(
        {
            "stages": ["zero", "evaluate"],
            "model": {"pretrained": str(folder)},
            "task": [f"jsonl:{data}"],
            "task_options": {f"jsonl:{data}": {"test_share": 0.3}},
            "response_format": "boxed",
            "system_prompt": "Be brief.",
            "zero": {
                "start": str(folder),
                "rewards": {"accuracy": 1.0, name: 0.5},
                **{"steps": 1, "prompts": 2, "group_size": 4, "max_new_tokens": 8},
            },
            "evaluate": {"problems": 2, "k": 1, "k_problems": 1, "max_new_tokens": 8},
        }
    )
    run_dir = RunDir(tmp_path / "run")
    pipeline.run(recipe, run_dir, progress=Progress(quiet=True))
    zero = run_dir.stage("zero")
    (row,) = zero.metrics()
    assert 0 < row["reward_errors"] < 8 and row["reward_error"] == f"{name}: error: ValueError: odd"
    assert -0.8 <= row[f"reward/{name}"] < 0 and row["reward/accuracy"] == 0.0
    assert "language_consistency" not in row, "no list of words tells Hawaiian, and nothing asks for it"
    assert all(sample["text"].startswith("<think>") for sample in zero.samples())
    assert "reward_errors" in [warning["kind"] for warning in zero.warnings()]
    assert set(zero.record()["config"]["files"]) == {f"jsonl:{data}", name, str(folder)}


def test_the_language_reward_asks_for_a_language_that_can_be_told(tmp_path, recipe):
    path = tmp_path / "data.jsonl"
    path.write_text(path.read_text().replace('"answer"', '"language": "haw", "answer"'))
    assert check(recipe) is not None
    recipe.zero.rewards["language_consistency"] = 1.0
    with pytest.raises(
        UserError, match=r"zero\.rewards\.language_consistency: language: 'haw' has no word list"
    ):
        check(recipe)
