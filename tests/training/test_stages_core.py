"""base, zero, cold_start, sft1, rl_reasoning and evaluate through the pipeline, very small: what they write and say."""

import shutil

import pytest

from tests.support.finished import is_done
from training import pipeline, responses
from training.checkpoint import checkpoint_hash, load_model
from training.errors import UserError
from training.estimate import estimate
from training.progress import Progress
from training.recipe import load
from training.refine import refine
from training.response import parse
from training.run_dir import RunDir
from training.stages import evaluate
from training.tasks import get_task
from training.tasks.general import GeneralTask
from training.tokenizer import build_tokenizer

STAGES = ["base", "zero", "cold_start", "sft1", "rl_reasoning", "evaluate"]
# A corpus of worked examples almost alone, so that a hundred steps are enough for the routes to find something.
SMALL = [
    f"stages=[{','.join(STAGES)}]",
    "base.corpus={tidy: 0.3, mixed: 0.1, few_shot: 0.3, reflect: 0.3}",
    "base.steps=130",
    "base.batch_size=32",
    "zero.steps=2",
    "cold_start.prompts=40",
    "rl_reasoning.steps=2",
    "evaluate.k_problems=8",
    "evaluate.max_new_tokens=32",
    "evaluate.splits=[test, harder]",
    "evaluate.reach=4",
    "evaluate.reach_problems=6",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    general = GeneralTask.problems
    with pytest.MonkeyPatch.context() as patch:
        # a few of the general questions: every checkpoint is asked all
        patch.setattr(GeneralTask, "problems", lambda task, split: general(task, split)[::8])
        pipeline.run(load("smoke", SMALL), run_dir, progress=Progress(quiet=True))
    return run_dir


def rows(run, stage, name="data.jsonl"):
    return run.stage(stage).read_data(name)


def test_every_stage_is_done_and_its_checkpoint_loads(run):
    for name in STAGES:
        assert is_done(run.stage(name)), name
    for name in ("base", "zero", "sft1", "rl_reasoning"):
        model, tokenizer = load_model(run.stage(name).path / "checkpoint")
        assert model.config.model_type == "deepseek_v3" and len(tokenizer) == len(build_tokenizer())


def test_pretraining_learns_and_reports(run):
    metrics = run.stage("base").metrics()
    assert len(metrics) == 130 and metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert set(metrics[0]) >= {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "expert_load",
        "tokens_per_second",
    }


def test_all_three_routes_find_something(run):
    metrics = run.stage("cold_start").record()["metrics"]
    for route in ("few_shot", "reflect", "refine"):
        assert metrics[f"{route}/asked"] == 80  # 40 problems, two samples each
        assert metrics[f"{route}/kept"] == sum(row["route"] == route for row in rows(run, "cold_start")) > 0


def test_a_cold_start_takes_the_routes_that_the_recipe_names(run, tmp_path):
    """Here worked examples before zero's checkpoint alone."""
    start = run.stage("zero").path / "checkpoint"
    words = [
        f"zero.start={start}",
        "zero.steps=0",
        "stages=[zero, cold_start]",
        "cold_start.routes={few_shot: zero}",
    ]
    recipe = load("smoke", [*SMALL, *words])
    few = RunDir(tmp_path / "few")
    pipeline.run(recipe, few, progress=Progress(quiet=True))
    metrics = few.stage("cold_start").record()["metrics"]
    assert metrics["asked"] == metrics["few_shot/asked"] == 80 and "reflect/asked" not in metrics
    assert {(row["route"], row["stage"]) for row in rows(few, "cold_start")} == {("few_shot", "zero")}
    assert estimate(recipe)[-1].work == "80 responses"


def test_cold_start_data_are_right_readable_and_say_where_they_come_from(run):
    task = get_task("arithmetic", steps=1, largest=29)
    problems = {problem.id: problem for problem in task.problems("train")}
    hashes = {name: checkpoint_hash(run.stage(name).path / "checkpoint") for name in ("base", "zero")}
    tokenizer = build_tokenizer()
    for row in rows(run, "cold_start"):
        response, problem = parse(row["response_text"]), problems[row["problem_id"]]
        assert response.well_formed and row["response_text"].startswith("<|special_token|>")
        assert task.check(problem, response.answer)
        assert row["checkpoint"] == hashes["zero" if row["route"] == "refine" else "base"]
        assert row["seed"] == 0 and row["question"] == problem.question
        # The text is what was sampled, or what the named rules make of it.
        sampled = tokenizer.decode([i for i in row["response_ids"] if i != tokenizer.eos_token_id])
        assert row.get("before", row["response_text"]) == sampled
        dictionary = task.dictionary(problem.language) if row["route"] == "refine" else {}
        assert refine(sampled, problem, dictionary) == (row["response_text"], row.get("rules", []))
        assert tokenizer.decode(row["prompt_ids"]).startswith("<bos> ")


def test_rejected_responses_are_shown_with_their_reasons(run):
    shown = rows(run, "cold_start", "rejected.jsonl")
    assert shown and all(row["filter"] and row["reason"] and row["response_text"] for row in shown)


def test_evaluation_has_a_row_for_every_checkpoint_split_and_language(run):
    table = rows(run, "evaluate", "evaluation.jsonl")
    assert {(row["checkpoint"], row["split"], row["language"]) for row in table} == {
        (name, split, language)
        for name in ("base", "zero", "sft1", "rl_reasoning")
        for split in ("test", "harder")
        for language in ("all", "de", "en")
    }
    for row in table:
        assert row["wilson_low"] - 1e-9 <= row["accuracy"] <= row["wilson_high"] + 1e-9
        assert row["greedy_low"] - 1e-9 <= row["greedy"] <= row["greedy_high"] + 1e-9
        assert 0 < row["greedy_problems"] <= row["problems"]
        assert row["pass@1"] <= row["pass@k"]
        assert row["well_formed_and_right"] <= min(row["accuracy"], row["format"])
        if row["split"] == "test" and row["language"] == "all":
            assert 0 <= row["helpful"] <= 1 and 0 <= row["harmless"] <= 1
    test = {(row["checkpoint"], row["language"]): row for row in table if row["split"] == "test"}
    assert test["base", "all"]["problems"] == test["base", "de"]["problems"] + test["base", "en"]["problems"]


def test_reach_is_measured_where_the_recipe_says_so(run):
    for row in rows(run, "evaluate", "evaluation.jsonl"):
        asked = row["checkpoint"] in ("base", "zero") and row["language"] == "all"
        assert ("reach" in row) == asked
        if asked:
            assert row["reach_problems"] == 6 and list(row["reach"]) == ["1", "2", "4"]
            assert row["reach"]["1"] <= row["reach"]["2"] <= row["reach"]["4"]


def test_a_check_that_raises_is_counted_beside_the_marks(run, monkeypatch):
    recipe = run.read_recipe(["evaluate.problems=4", "evaluate.k_problems=2", "evaluate.splits=[test]"])
    source = responses.load_source("zero", run.stage("zero").path / "checkpoint", recipe)

    def broken(task, problem, answer):
        raise ArithmeticError("no such number")

    for task in responses.tasks(recipe).values():
        monkeypatch.setattr(type(task), "check", broken)
    rows, _ = evaluate.marks(source, "zero", recipe, recipe.evaluate)
    row = rows[0]
    assert row["accuracy"] == 0.0
    asked_with_an_answer = row["reward_errors"]
    assert 0 < asked_with_an_answer <= 4 + 2 * recipe.evaluate.k + 2


def test_the_same_problems_are_shown_for_every_checkpoint(run):
    shown = run.stage("evaluate").samples()
    asked = {
        name: [r["problem_id"] for r in shown if r["checkpoint"] == name] for name in ("base", "zero", "sft1")
    }
    assert asked["base"] and asked["base"] == asked["zero"] == asked["sft1"]


def test_a_second_run_gives_the_same_numbers(run, tmp_path):
    """A few steps of base twice, and zero again from what base has learnt."""
    again, few, same = (RunDir(tmp_path / name) for name in ("again", "few", "same"))
    shutil.copytree(run.stage("base").path, again.stage("base").path)
    shutil.copy(run.path / "recipe.yaml", again.path)
    pipeline.run(load("smoke", [*SMALL, "stages=[base, zero]"]), again, progress=Progress(quiet=True))
    for each in (few, same):
        words = [*SMALL, "stages=[base]", "base.steps=6"]
        pipeline.run(load("smoke", words), each, progress=Progress(quiet=True))
    for name, first, second in (("zero", run, again), ("base", few, same)):
        hashes = [checkpoint_hash(r.stage(name).path / "checkpoint") for r in (first, second)]
        assert hashes[0] == hashes[1]


def test_a_recipe_without_reasoning_problems_is_refused(run, tmp_path):
    recipe = load("smoke", ["stages=[base, zero]", "task=[general]", "base.steps=1"])
    with pytest.raises(UserError, match="no task of the recipe has reasoning problems"):
        pipeline.run(recipe, RunDir(tmp_path / "run"), progress=Progress(quiet=True))
