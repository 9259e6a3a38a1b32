"""Traces from a file: what is read, what is refused, and SFT and distillation that learn from them."""

import json
from dataclasses import replace

import pytest

from tests.support.own_models import write_folder
from training import pipeline, responses, traces
from training.check import check
from training.errors import UserError
from training.loops import next_token
from training.progress import Progress
from training.prompts import Turn
from training.recipe import load, make
from training.run_dir import RunDir

MESSAGES = [
    {"role": "user", "content": "What is 1 plus 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And plus 3?"},
    {"role": "assistant", "content": "<think> 2 plus 3 is 5 </think> <answer> 5 </answer>"},
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "traces.jsonl"
    rows = [{"messages": MESSAGES, "source": "x"}, {"question": "why?", "response": "so"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_conversation_and_a_question_with_its_response(path):
    conversation, plain = traces.read(path)
    assert conversation.text == MESSAGES[-1]["content"]
    assert list(conversation.prompt) == [Turn(turn["role"], turn["content"]) for turn in MESSAGES[:-1]]
    assert (plain.text, list(plain.prompt)) == ("so", [Turn("user", "why?")])


def test_the_system_prompt_of_the_recipe_stands_before_conversations_that_have_none(path):
    own = {"messages": [{"role": "system", "content": "Own."}, *MESSAGES]}
    path.write_text(json.dumps(own) + "\n" + json.dumps({"question": "why?", "response": "so"}))
    first, second = traces.read(path, "Be brief.")
    assert first.prompt[0] == Turn("system", "Own.") and second.prompt[0] == Turn("system", "Be brief.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a"}', "line 1: field 'response': expected text, it is missing"),
        ('{"question": "a", "response": " "}', "line 1: field 'response'"),
        ('{"prompt": "a"}', "line 1: expected the field 'messages', or 'question' and 'response'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "a response of the assistant last"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "a turn of the user before the response"),
        ('{"messages": [{"role": "user"}]}', "expected turns with a role"),
        ("{", "line 1: "),
        ("", "there are no traces in the file"),
    ],
)
def test_a_broken_file_is_named_before_anything_runs(tmp_path, line, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(line)
    recipe = load("smoke", ["stages=[base, sft1]", f"sft1.data={path}"])
    with pytest.raises(UserError, match=rf"sft1\.data: .*traces\.jsonl.*{message}"):
        check(recipe)


def test_with_a_file_no_stage_has_to_make_the_data(path):
    recipe = load(
        "smoke", ["stages=[base, sft1, sft2]", "sft2.start=base", f"sft1.data={path}", f"sft2.data={path}"]
    )
    assert pipeline.plan(recipe) == ["base", "sft1", "sft2"]
    assert pipeline.parents_of("sft1", recipe) == ["base"]


def test_sft_and_distillation_learn_from_a_file_on_ones_own_model(tmp_path, path, monkeypatch):
    folder = write_folder(tmp_path / "own", "qwen2", template="chatml")
    learnt = []
    train = next_token.train
    monkeypatch.setattr(
        next_token,
        "train",
        lambda model, tokenizer, documents, *more, **options: (
            learnt.append(documents) or train(model, tokenizer, documents, *more, **options)
        ),
    )
    recipe = make(
        {
            "stages": ["sft1", "distill"],
            "model": {"pretrained": str(folder)},
            "sft1": {"start": str(folder), "data": str(path), "steps": 2, "batch_size": 2},
            "distill": {
                "data": str(path),
                "students": {"own": {"pretrained": str(folder), "steps": 1}},
                "max_new_tokens": 8,
            },
        }
    )
    run_dir = RunDir(tmp_path / "run")
    assert pipeline.run(recipe, run_dir, progress=Progress(quiet=True)) == ["sft1", "distill"]
    assert [[document.text for document in documents] for documents in learnt] == [
        [MESSAGES[-1]["content"], "so"]
    ] * 2
    assert run_dir.stage("sft1").record()["metrics"]["documents"] == 2
    assert set(run_dir.stage("distill").checkpoints()) == {"distill-own"}
    assert str(path) in run_dir.stage("sft1").record()["config"]["files"]


def test_the_system_prompt_and_the_form_of_the_answer_are_in_the_prompts(tmp_path):
    recipe = replace(load("smoke"), system_prompt="Be brief.", response_format="boxed")
    problem = responses.problems(recipe, "train", ("reasoning",))[0]
    assert [turn.role for turn in responses.prompt_of("sft1", recipe)(problem)] == ["system", "user"]
    system, instruction, user = responses.prompt_of("zero", recipe)(problem)
    assert system == Turn("system", "Be brief.") and user == Turn("user", problem.question)
    assert "\\boxed{}" in instruction.content and "<answer>" not in instruction.content
