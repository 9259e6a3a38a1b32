"""One stage without a recipe: `sft`, `grpo`, `distill` and `evaluate` on a folder and a file, and `start: FOLDER`."""

import io
import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.own_models import write_folder
from training.cli import main
from training.files import read_jsonl
from training.recipe import load
from training.run_dir import RunDir
from training.tasks import get_task

SHORT = ["zero.steps=1", "prompts=2", "group_size=2", "max_new_tokens=8"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("made") / "own", "qwen2", bos=None, dtype="bfloat16")


@pytest.fixture
def brought(own, tmp_path, monkeypatch):
    """A folder `own` and a file q.jsonl in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(own, tmp_path / "own")
    rows = [{"question": f"What is {n} plus 3?", "answer": str(n + 3)} for n in range(20)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(command, *words):
    return main([command, "--model", "own", "--data", "q.jsonl", "--run", "run", *words])


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(("words", "stage"), [([], "zero"), (["--prompt", "chat"], "rl_reasoning")])
def test_grpo_on_a_folder_and_a_file(brought, capsys, words, stage):
    assert train("grpo", "steps=1", *SHORT[1:], *words) == 0
    (step,) = read_jsonl(brought / "run" / stage / "metrics.jsonl")
    assert {"reward", "reward/accuracy", "reward/format"} <= step.keys()
    # nothing is right, so nothing but the dtype's own rounding may change
    made, own = weights(brought / "run" / stage / "checkpoint"), weights("own")
    assert made.keys() == own.keys() and all(tensor.dtype == torch.bfloat16 for tensor in made.values())
    assert main(["samples", "--run", "run"]) == 0
    assert "plus 3?" in capsys.readouterr().out
    assert train("grpo", "steps=1", *SHORT[1:], *words) == 0
    assert "(done before)" in capsys.readouterr().out


def test_sft_learns_a_file_of_traces(brought):
    rows = [{"question": f"What is {n} plus 3?", "response": f"It is {n + 3}."} for n in range(20)]
    (brought / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train("sft", "epochs=4", "batch_size=4", "lr=1e-2", "lr_end=1e-3") == 0
    losses = [row["loss"] for row in read_jsonl(brought / "run/sft1/metrics.jsonl")]
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]


def test_distill_teaches_a_student_what_the_teacher_said(brought, capsys, monkeypatch):
    write_folder(brought / "pupil", "llama", seed=1)
    words = ["samples=1", "max_new_tokens=8", "filters=[]", "distill.students.student.steps=2"]
    assert train("distill", "--student", "pupil", *words) == 0
    rows = RunDir("run").stage("distill").read_data("data.jsonl")
    assert {row["question"] for row in rows} <= {f"What is {n} plus 3?" for n in range(20)} and len(rows) > 9
    before, after = weights("pupil"), weights("run/distill/checkpoint-student")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "the model is run/distill/checkpoint-student" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1?\n"))
    assert main(["chat", "--run", "run", "--max-new-tokens", "4"]) == 0


def test_students_from_random_weights_read_responses_to_their_end(brought):
    words = ["samples=1", "prompts=2", "max_new_tokens=160", "filters=[]"]
    words += [f"distill.students.{name}.steps=1" for name in ("qwen2", "llama")]
    assert train("distill", *words) == 0
    stage = RunDir("run").stage("distill")
    told = [row["text"] for row in read_jsonl(stage.path / "warnings.jsonl")]
    assert any("did not end within 160 tokens" in text for text in told)
    assert not any("documents were cut" in text for text in told)


@pytest.mark.parametrize(
    ("missing", "said"), [("tokenizer.json", "tokenizer.json"), ("model.safetensors", "weights")]
)
@pytest.mark.parametrize("folder", ["own", "pupil"])
def test_a_folder_that_lacks_a_file_is_named_before_the_first_stage(brought, capsys, folder, missing, said):
    write_folder(brought / "pupil", "llama", seed=1)
    (brought / folder / missing).unlink()
    for word in ("--dry-run", "steps=1"):
        assert train("distill", "--student", "pupil", word.replace("steps", "samples")) == 2
        assert f"{folder} holds no {said}" in capsys.readouterr().err
    assert not (brought / "run" / "distill").exists()


def test_a_run_is_evaluated_when_what_it_began_with_is_gone(brought, capsys):
    assert train("grpo", "steps=1", *SHORT[1:]) == 0
    (brought / "own").rename(brought / "elsewhere")
    words = ["problems=2", "k_problems=1", "k=1", "max_new_tokens=4"]
    options = "task_options={'jsonl:q.jsonl': {test_share: 0.5}}"
    assert main(["evaluate", "--run", "run", options, *words]) == 0
    assert "zero (in %" in capsys.readouterr().out


def test_evaluate_asks_every_row_of_the_file(brought, capsys):
    words = ["k_problems=2", "k=1", "evaluate.max_new_tokens=8"]
    assert main(["evaluate", "--model", "own", "--data", "q.jsonl", "--out", "marks.jsonl", *words]) == 0
    assert "own (in %" in capsys.readouterr().out
    row = read_jsonl(brought / "marks.jsonl")[0]
    assert (row["split"], row["problems"]) == ("test", 20)


def test_evaluate_asks_every_row_of_a_file_with_other_names_too(brought, capsys):
    text = (brought / "q.jsonl").read_text().replace('"question"', '"problem"')
    (brought / "q.jsonl").write_text(text)
    words = ["k_problems=2", "k=1", "evaluate.max_new_tokens=8"]
    command = ["evaluate", "--model", "own", "--data", "q.jsonl", "--out", "marks.jsonl", *words]
    assert main(command) == 2
    (option,) = re.findall(r"'(task_options=.*)'", capsys.readouterr().err)
    option = option.replace("question: NAME, answer: NAME", "question: problem")
    assert main([*command, option]) == 0
    assert read_jsonl(brought / "marks.jsonl")[0]["problems"] == 20


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["grpo", "--model", "nowhere", "--data", "q.jsonl"], "nowhere"),
        (["grpo", "--model", "own", "--data", "nowhere.jsonl"], "--data: there is no file nowhere.jsonl"),
        (
            ["grpo", "--model", "own", "--data", "q.jsonl", "temperature=0"],
            "zero.temperature: expected more than 0, got 0",
        ),
        (
            ["grpo", "--model", "own", "--data", "q.jsonl", "stepz=0"],
            "unknown key 'stepz': did you mean 'steps'",
        ),
        (["evaluate", "--model", "own"], "expected --model FOLDER with --data FILE"),
        (["evaluate", "--model", "own", "--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (
            ["evaluate", "zero", "--model", "own", "--data", "q.jsonl"],
            "expected --model FOLDER with --data FILE",
        ),
    ],
)
def test_a_mistake_is_one_line(brought, capsys, command, said):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (brought / "runs").exists()


def test_problems_that_need_no_reasoning_are_evaluated_too(brought, capsys):
    rows = [{"question": f"Say {n}.", "answer": str(n), "kind": "helpful"} for n in range(4)]
    (brought / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(["evaluate", "--model", "own", "--data", "q.jsonl", "max_new_tokens=8", "--out", "marks.jsonl"])
        == 0
    )
    row = read_jsonl(brought / "marks.jsonl")[0]
    assert row["helpful"] is not None and row["accuracy"] is None and row["pass@1"] is None


def test_a_dry_run_counts_the_documents_of_files(brought, capsys):
    assert train("distill", "--dry-run", "samples=3") == 0
    count = len(get_task("jsonl:q.jsonl").problems("train"))
    assert f"{3 * count} responses" in capsys.readouterr().out
    (brought / "q.jsonl").write_text('{"question": "1 + 1", "response": "2"}\n' * 30)
    assert train("sft", "--dry-run", "epochs=2") == 0
    trained = capsys.readouterr().out.partition("sft1 ")[2]
    assert "2 epochs of 32 documents" in trained


def test_a_dry_run_says_what_it_starts_from(brought, capsys):
    assert train("grpo", "--dry-run", *SHORT) == 0
    assert "zero  <- own" in capsys.readouterr().out
    assert not (brought / "run").exists()


def test_a_stage_of_a_recipe_starts_from_a_folder_and_notices_that_it_changed(brought, capsys):
    words = [
        "stages=[zero]",
        "zero.start=own",
        "task=['jsonl:q.jsonl']",
        *(f"zero.{word}" for word in SHORT[1:]),
        SHORT[0],
    ]
    assert main(["run", "tiny", "--run", "run", *words]) == 0
    assert json.loads((brought / "run/zero/lineage.json").read_text())["inputs"] == {}
    write_folder(brought / "own", "qwen2", bos=None, dtype="bfloat16", seed=5)
    assert main(["run", "tiny", "--run", "run", *words]) == 2
    assert "stage zero read own, whose content has changed since" in capsys.readouterr().err
    assert main(["run", "tiny", "--run", "run", "--redo", "zero", *words]) == 0


def test_a_start_that_is_nothing_is_named(brought, capsys):
    words = ["zero.start=sft3", "task=['jsonl:q.jsonl']", "stages=[zero]"]
    assert main(["run", "tiny", *words]) == 2
    assert "zero.start: expected one of base, " in (error := capsys.readouterr().err)
    assert "or the folder of a checkpoint, got 'sft3': did you mean 'sft" in error
    assert load("tiny").distill.teacher == "rl_all"
