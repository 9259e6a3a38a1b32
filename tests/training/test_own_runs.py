"""What a person sees who trains a model of their own: it learns what it is asked, and a changed setting is told."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.own_models import write_folder
from training import pipeline, prompts, responses, reward_model, rewards
from training.checkpoint import load_model, save_model
from training.cli import main
from training.context import StageContext
from training.document import Document
from training.engines.transformers import TransformersEngine
from training.errors import UserError
from training.loops import next_token
from training.loops.sample import Prompt, sample
from training.model import load
from training.progress import Progress
from training.prompts import Turn
from training.recipe import load as load_recipe
from training.reward_model import Pair, Point
from training.run_dir import RunDir, StageDir
from training.sections import NextToken
from training.tasks.problem import Problem

ANSWERS = {"What is 12 plus 34?": "46", "What is 1 plus 2?": "3", "Which half of 8?": "4"}
PROBLEMS = [
    Problem(f"p{n}", "test", "reasoning", "en", question, answer)
    for n, (question, answer) in enumerate(ANSWERS.items())
]


def response(problem):
    return f"<think> it is {problem.reference} </think> <answer> {problem.reference} </answer>"


def context(folder, config, name="sft1"):
    stage = StageDir(folder)
    stage.begin({}, {})
    return StageContext(name, load_recipe("smoke"), config, stage, {}, Progress(quiet=True))


@pytest.mark.parametrize("template", ["chatml_think", "llama3", None])
def test_what_sft_teaches_is_what_the_model_then_says(tmp_path, template):
    """A folder without pad and with an eos that is not its end of turn learns three answers by heart."""
    folder = write_folder(tmp_path / "own", template=template, eos="<|endoftext|>", dtype="bfloat16")
    model, tokenizer = load(folder)
    documents = [Document(response(problem), prompts.chat(problem)) for problem in PROBLEMS]
    config = NextToken(steps=70, batch_size=3, lr=1e-2, lr_end=1e-3, max_length=0)
    next_token.train(model, tokenizer, documents, config, context(tmp_path / "sft1", config))
    save_model(model, tokenizer, tmp_path / "checkpoint")
    model, tokenizer = load(tmp_path / "checkpoint")
    asked = [Prompt(problem, prompts.chat(problem)) for problem in PROBLEMS]
    drawn = sample(
        TransformersEngine(model, tokenizer), asked, temperature=0.0, max_new_tokens=60, seed_parts=(0,)
    )
    for completion in drawn:
        said = responses.as_sample(completion, "answer_tags")
        assert completion.finished
        assert rewards.format(said).value == 1.0
        assert said.response.answer == completion.problem.reference


# --- the prompt of a checkpoint ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with base and zero of a small model, and its problems in a file."""
    folder = tmp_path_factory.mktemp("run")
    own = write_folder(folder / "own", pad=None, eos="<|endoftext|>", dtype="bfloat16")
    rows = [{"question": f"What is {n} plus 1?", "answer": n + 1} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"stages: [base, zero]\nmodel: {{pretrained: '{own}'}}\ntask: ['jsonl:{folder / 'data.jsonl'}']\n"
        "zero: {steps: 1, prompts: 2, group_size: 2, max_new_tokens: 4, kl_coef: 0}\n"
        "evaluate: {problems: 2, k: 1, k_problems: 1, max_new_tokens: 4, splits: [test]}\n"
    )
    pipeline.run(load_recipe(folder / "recipe.yaml"), RunDir(folder / "run"), progress=Progress(quiet=True))
    return folder


def shown(capsys, run, *words):
    assert main(["evaluate", *words, "--run", str(run / "run")]) == 0
    return capsys.readouterr().out


def test_a_checkpoint_is_asked_as_it_was_trained_wherever_its_folder_lies(run, tmp_path, capsys):
    moved = tmp_path / "chat-moved"  # a name that says something else
    (run / "run" / "zero" / "checkpoint").rename(moved)
    try:
        assert "prompt: zero)" in shown(capsys, run, str(moved))
        assert "prompt: chat)" in shown(capsys, run, str(moved), "--prompt", "chat")
        source = responses.load_source("", moved, load_recipe(run / "recipe.yaml"))
        assert source.prompt(PROBLEMS[0]) == prompts.zero(PROBLEMS[0])
    finally:
        moved.rename(run / "run" / "zero" / "checkpoint")


def test_a_folder_that_notes_nothing_is_asked_the_bare_question_or_as_is_said(run, tmp_path, capsys):
    zero = write_folder(tmp_path / "zero-of-someone")
    assert "prompt: chat)" in shown(capsys, run, str(zero))
    assert "prompt: zero)" in shown(capsys, run, str(zero), "--prompt", "zero")


def test_the_examples_of_the_prompt_go_with_the_checkpoint(run, tmp_path):
    model, tokenizer = load_model(write_folder(tmp_path / "own"))
    recipe = load_recipe("smoke", ["zero.examples=[{question: '1 + 1', response: '<answer> 2 </answer>'}]"])
    save_model(model, tokenizer, tmp_path / "saved", responses.style_of("zero", recipe))
    source = responses.load_source("", tmp_path / "saved", load_recipe("smoke"))
    assert source.prompt(PROBLEMS[0])[1:3] == [
        Turn("user", "1 + 1"),
        Turn("assistant", "<answer> 2 </answer>"),
    ]


# --- settings that steer how a run computes ---


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("threads=2", "threads = 1 and now it is 2"),
        ("gradient_checkpointing=true", "gradient_checkpointing = False and now it is True"),
        ("zero.micro_batch_tokens=64", "zero.micro_batch_tokens = 4096 and now it is 64"),
        ("evaluate.batch_size=8", "evaluate.batch_size = 64 and now it is 8"),
    ],
)
def test_a_setting_that_may_change_the_last_bits_is_told_and_keeps_the_work(run, word, told):
    said = []
    progress = Progress(quiet=True)
    progress.say = lambda text="": said.append(text)
    before = torch.get_num_threads()
    try:
        assert (
            pipeline.run(load_recipe(run / "recipe.yaml", [word]), RunDir(run / "run"), progress=progress)
            == []
        )
        pipeline.run(load_recipe(run / "recipe.yaml"), RunDir(run / "run"), progress=Progress(quiet=True))
    finally:
        torch.set_num_threads(before)
    assert f"warning: {told}: what follows may differ from the run so far in its last bits" in said


def test_a_setting_that_decides_a_result_is_still_refused(run):
    with pytest.raises(UserError, match="dtype = float32 and now it is bfloat16"):
        pipeline.run(load_recipe(run / "recipe.yaml", ["dtype=bfloat16"]), RunDir(run / "run"))


def test_a_dry_run_says_what_a_parameter_costs(run, capsys):
    assert main(["run", str(run / "recipe.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    model, _ = load_model(run / "own")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"({parameters:,} in all)" in out
    assert "bytes per parameter: 16 in training" in out


# --- reward models ---


@pytest.mark.parametrize(
    ("family", "eos"),
    [
        ("qwen2", "<|im_end|>"),
        ("qwen2", "<|endoftext|>"),
        ("gpt2", "<|im_end|>"),
        ("qwen3_moe", "<|endoftext|>"),
    ],
)
def test_reward_models_of_a_folder_without_pad_and_bos_learn(tmp_path, family, eos):
    language_model, tokenizer = load(write_folder(tmp_path / "own", family, eos=eos, dtype="bfloat16"))
    model = reward_model.from_language_model(language_model)
    pairs = [Pair(problem, response(problem), "i cannot tell") for problem in PROBLEMS]
    points = [
        Point(problem, text, good)
        for problem in PROBLEMS
        for text, good in ((response(problem), True), ("no", False))
    ]
    config = NextToken(steps=12, batch_size=6, lr=1e-2, lr_end=1e-3)
    for data in (pairs, points):
        reward_model.train(model, tokenizer, data, config, context(tmp_path / type(data[0]).__name__, config))
        assert reward_model.accuracy(model, tokenizer, data) == 1.0
    # alone or beside longer texts: padding changes no score
    items = [(problem, response(problem) * n) for n, problem in enumerate(PROBLEMS, 1)]
    with torch.no_grad():
        together = reward_model.rewards(model, tokenizer, items)
        alone = torch.cat([reward_model.rewards(model, tokenizer, [item]) for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    save_model(model, tokenizer, tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(
            reward_model.rewards(again, AutoTokenizer.from_pretrained(tmp_path / "saved"), items), together
        )
