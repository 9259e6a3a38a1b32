"""The whole recipe is checked before its first stage: every mistake is one line that names the key, at the start."""

import json
import re
import shlex
from pathlib import Path

import pytest

from training import pipeline, responses
from training.check import check
from training.checkpoint import save_model
from training.cli import main
from training.errors import UserError
from training.estimate import estimate
from training.model import build_model
from training.progress import Progress
from training.recipe import STAGE_NAMES, load, names
from training.run_dir import RunDir
from training.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]


def faults(tmp_path, *words, recipe="tiny"):
    """What the dry run, the run and the stages say; nothing may be written."""
    found = []
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            loaded = load(recipe, words)
            if not found:
                check(loaded)
            else:
                pipeline.run(loaded, RunDir(tmp_path / "run"), progress=Progress(quiet=True))
        found.append(str(caught.value))
    assert found[0] == found[1] and "\n" not in found[0]
    assert not (tmp_path / "run").exists()
    return found[0]


# They need what is not installed everywhere, or another run.
OTHERS = ("deepseek-r1", "smollm2", "smollm2-languages", "smollm2-student", "tiny-controls")


@pytest.mark.parametrize("name", [name for name in names() if name not in OTHERS])
def test_the_embedded_recipes_have_no_fault(name):
    assert check(load(name)) == []


def test_the_controls_of_tiny_start_from_its_base(tmp_path, monkeypatch):
    recipe = load("tiny-controls")
    (starts,) = {recipe.zero.start, recipe.distill.teacher, recipe.distill.students["own"].pretrained}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training").symlink_to(ROOT / "training")
    with pytest.raises(UserError, match=f"or the folder of a checkpoint, got '{starts}'"):
        check(recipe)
    save_model(build_model(load("tiny").model, build_tokenizer(), 0), build_tokenizer(), tmp_path / starts)
    assert check(recipe) == []


@pytest.mark.parametrize("name", ["smollm2-languages", "smollm2-student"])
def test_what_goes_on_from_r1_zero_of_smollm2_starts_from_its_run(name, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    recipe = load(name)
    recipe.task_options[recipe.task[0]]["size"] = 300
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="or the folder of a checkpoint, got 'runs/smollm2/"):
        check(recipe)
    for stage in ("base", "zero"):
        save_model(
            build_model(load("tiny").model, build_tokenizer(), 0),
            build_tokenizer(),
            tmp_path / f"runs/smollm2/{stage}/checkpoint",
        )
    assert all("asks" in note for note in check(recipe))  # fewer problems than the recipe has


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("zero.variant=dapo", "zero.variant: expected one of 'grpo', .*, got 'dapo'"),
        ("rl_all.variant=dapo", "rl_all.variant: expected one of 'grpo', .*, got 'dapo'"),
        ("rl_reasoning.reduction=foo", "rl_reasoning.reduction: expected one of 'sequence', .*, got 'foo'"),
        ("zero.ratio=tokens", "zero.ratio: expected one of token, sequence, output, got 'tokens'"),
        ("zero.temperature=0", "zero.temperature: expected more than 0, got 0"),
        ("evaluate.reach_of=[zeroo]", "evaluate.reach_of: unknown checkpoint 'zeroo': did you mean 'zero'"),
        ("evaluate.reach_of=[qwen2]", "evaluate.reach_of: unknown checkpoint .* mean 'distill-qwen2'"),
        ("sft1.start=''", "sft1.start: expected one of base, .*, or the folder of a checkpoint, got ''"),
        ("zero.minibatches=1000", "zero.minibatches: expected at most 384, .*, got 1000"),
        (
            "zero.max_new_tokens_from={2: 0}",
            "zero.max_new_tokens_from: expected .* at least 1 token, got 2: 0",
        ),
        ("zero.rewards={acuracy: 1}", "zero.rewards: unknown reward term 'acuracy': did you mean 'accuracy'"),
        ("zero.rewards={}", "zero.rewards: expected a weight for one of accuracy, .* reasoning .*, got {}"),
        ("zero.rewards={helpful: 1}", "zero.rewards: expected a weight .* which reasoning problems earn"),
        ("rl_all.rewards={accuracy: 1}", "rl_all.rewards: expected a weight for one of helpful, "),
        ("rl_all.mix={reason: 1}", "rl_all.mix: unknown kind of problems 'reason': did you mean 'reasoning'"),
        ("rl_all.mix={reasoning: 0}", "rl_all.mix: expected shares from 0, not all of them 0"),
        ("rl_all.preference_share=2", "rl_all.preference_share: expected at least 0 and at most 1, got 2"),
        ("cold_start.filters=[wrong]", "cold_start.filters: unknown filter 'wrong': did you mean"),
        ("distill.filters=[wrong]", "distill.filters: unknown filter 'wrong'"),
        ("rejection.general_share=1", "rejection.general_share: expected at least 0 and less than 1, got 1"),
        ("rejection.general_from=judge", "rejection.general_from: expected one of base, .*, got 'judge'"),
        ("judge.samples_from=[cold_start]", "judge.samples_from: expected one of base, .*, got 'cold_start'"),
        ("judge.samples_from=[]", "judge.samples_from: expected at least one entry, got \\[\\]"),
        ("judge.held_out=0", "judge.held_out: expected more than 0 and at most 1, got 0"),
        ("cold_start.top_p=0", "cold_start.top_p: expected more than 0 and at most 1, got 0"),
        ("evaluate.k_top_p=1.5", "evaluate.k_top_p: expected more than 0 and at most 1, got 1.5"),
        ("evaluate.k_problems=0", "evaluate.k_problems: expected at least 1, got 0"),
        ("evaluate.splits=[harder]", "evaluate.splits: expected test among them, .*, got \\['harder'\\]"),
        (
            "evaluate.splits=[tests]",
            "evaluate.splits\\[0\\]: expected one of train, test, harder, hardest, got 'tests'",
        ),
        ("sft1.epochs=0", "sft1.steps: expected at least 1 where sft1.epochs is 0, got 0"),
        ("base.steps=0", "base.steps: expected at least 1, for which the corpus is made, got 0"),
        ("judge={steps: 0, epochs: 0}", "judge.steps: expected at least 1 where judge.epochs is 0, got 0"),
        ("base.corpus={tidi: 1}", "base.corpus: unknown kind of documents 'tidi': did you mean 'tidy'"),
        (
            "base={steps: 0, epochs: 1}",
            "base.steps: expected at least 1, for which the corpus is made, got 0",
        ),
        ("base.corpus={tidy: 0}", "base.corpus: shares must be non-negative and not all 0"),
        ("distill.students={}", "distill.students: expected at least one entry, got {}"),
        (
            "distill.students={a/b: {epochs: 1}}",
            "distill.students: expected names of letters and digits, got 'a/b'",
        ),
        (
            "distill.students={a: {heads: 5}}",
            "distill.students.a.hidden_size: expected a multiple of twice heads = 5, got 64",
        ),
        (
            "distill.students={a: {heads: 2, hidden_size: 6}}",
            "distill.students.a.hidden_size: expected a multiple of twice heads = 2, got 6",
        ),
        ("model.dense_layers=4", "model.dense_layers: expected at most model.layers = 3, got 4"),
        ("model.expert_groups=8", "model.experts: expected at least 2 in each of the 8 groups, got 1"),
        (
            "model.expert_groups_per_token=2",
            "model.expert_groups_per_token: expected at most model.expert_groups = 1",
        ),
        ("model.vocab_size=10", "model.vocab_size: expected 0, or at least the 246 entries"),
        ("sft1.max_length=1", "sft1.max_length: expected 0, .* or at least 2, got 1"),
        ("zero.examples=[{question: a}]", "zero.examples\\[0\\]: expected a question and a response"),
        ("name=../elsewhere", "name: expected the name of a folder, without slashes, got '../elsewhere'"),
        ("reward_seconds=0", "reward_seconds: expected more than 0, got 0"),
        ("stages=[]", "stages: expected at least one entry, got \\[\\]"),
        ("task=[]", "task: expected at least one entry, got \\[\\]"),
        ("task=[arithmetik]", "task: unknown task 'arithmetik': did you mean 'arithmetic'"),
        (
            "task_options={arithmetc: {steps: 1}}",
            "task_options: unknown task 'arithmetc': did you mean 'arithmetic'",
        ),
        ("task_options={arithmetic: {step: 1}}", "task: unknown option of task 'arithmetic' 'step'"),
        ("task=['jsonl:nowhere.jsonl']", "task: jsonl:nowhere.jsonl: nowhere.jsonl cannot be read"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(tmp_path, word, said):
    assert re.match(said, faults(tmp_path, word))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zero.max_new_tokens=500"], "zero.max_new_tokens = 500: the model reads 256 tokens "),
        (["rl_all.sampling_rounds=2"], "rl_all.sampling_rounds = 2: one round, for rl_all.keep_groups=all"),
        (
            ["zero.warmup=30", "zero.steps=20"],
            "zero.warmup = 30: 20 steps in all, in which the learning rate",
        ),
        (["base.warmup=4", "base.steps=3"], "base.warmup = 4: 3 steps in all, "),
        (
            ["distill.students={a: {steps: 2, warmup: 3}}"],
            "distill.students.a.warmup = 3: 2 steps in all, in which",
        ),
        (["distill.beta=0.7"], "distill.beta = 0.7: no mixture is made, for distill.divergence is not jsd"),
        (["distill.divergence=jsd"], "distill.divergence = jsd: every student learns text (sft)"),
        (
            ["reward_models.max_length=64"],
            "reward_models.max_length = 64: of no effect: a text is scored as far",
        ),
        (["base.epochs=3"], "base.epochs = 3: of no effect: the corpus is made for the steps"),
        (["zero.reference_every=2", "zero.kl_coef=0"], "zero.reference_every = 2: no reference is held"),
    ],
)
def test_a_setting_that_has_no_effect_is_said(words, said):
    assert [note[: len(said)] for note in check(load("smoke", words), data=False)] == [said]


def test_a_reward_whose_file_cannot_be_imported_is_named_before_anything_runs(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text("import a_package_that_nobody_has\n\ndef brevity(sample):\n    return 1.0\n")
    said = faults(tmp_path, f"rl_all.rewards={{helpful: 1, 'python:{path}:brevity': 1}}")
    assert re.match("rl_all.rewards: python:.*brevity: .* cannot be imported: ModuleNotFoundError", said)


@pytest.fixture
def problems(tmp_path):
    """problems(count, *kinds) writes a file of as many problems of every kind and returns the word that names it."""

    def problems(count, *kinds, name="own.jsonl"):
        rows = [
            {"question": f"{kind} question {n} ?", "answer": str(n), "kind": kind}
            for kind in kinds
            for n in range(count)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"task=['jsonl:{path}']"

    return problems


def test_data_that_cannot_feed_a_stage_are_named_with_the_words_that_leave_it_out(tmp_path, problems):
    task = problems(80, "reasoning")
    said = faults(tmp_path, task)
    assert "no task of the recipe has helpful or unsafe problems to train on, as reward_models needs" in said
    assert "has helpful problems to train on, as rl_all needs" in said
    kept = [name for name in STAGE_NAMES if name != "reward_models"]
    words = [f"stages=[{','.join(kept)}]", "rl_all.mix={reasoning: 0.35}"]
    assert shlex.split(said.partition("run without: ")[2]) == words
    remarks = check(load("tiny", [task, *words]))
    assert any("has no worked examples and zero.examples is empty" in each for each in remarks)
    assert "evaluate: the tasks have no problems of the split harder, which is left out" in remarks


def test_data_of_one_kind_more_need_only_the_mix(tmp_path, problems):
    task = problems(80, "reasoning", "helpful")
    assert faults(tmp_path, task).endswith("run without: 'rl_all.mix={reasoning: 0.35, helpful: 0.4}'")
    remarks = check(load("tiny", [task, "rl_all.mix={reasoning: 1, helpful: 1}"]))
    assert any("no unsafe problems to train on: there will be no model of that" in each for each in remarks)


def test_a_test_split_that_is_empty_is_named(tmp_path, problems):
    task = problems(80, "reasoning")
    path = task[7:-2]
    said = faults(
        tmp_path, task, "stages=[base, zero, evaluate]", f"task_options={{'{path}': {{test_share: 0}}}}"
    )
    assert "has reasoning or helpful or unsafe problems held out for the test, as evaluate needs" in said
    (word,) = shlex.split(re.search("such as 3 of 10: (.*), or give", said)[1])
    check(load("tiny", [task, "stages=[base, zero, evaluate]", word]))
    check(load("tiny", [task, "stages=[base, zero]", f"task_options={{'{path}': {{test_share: 0}}}}"]))


def test_prompts_that_are_all_too_long_are_said_before_anything_runs(tmp_path, problems):
    """As the stage would say them, after hours."""
    words = [problems(60, "reasoning"), "stages=[base, zero]", "zero.max_new_tokens=4"]
    check(load("tiny", [*words, "model.max_length=40"]))
    assert re.match(
        r"zero: the prompts of all \d+ problems to train on have at least \d+ tokens, and the model reads 8$",
        faults(tmp_path, *words, "model.max_length=8"),
    )


def test_fewer_problems_than_a_stage_asks_are_said_and_the_dry_run_counts_them(problems):
    words = ["stages=[base, zero, evaluate]", "zero.prompts=60", "zero.group_size=4", "evaluate.problems=100"]
    words += ["evaluate.k_problems=5", "evaluate.k=3", "evaluate.reach=2"]
    recipe = load("tiny", [problems(60, "reasoning"), *words])
    (task,) = responses.tasks(recipe).values()
    train, test = len(task.problems("train")), len(task.problems("test"))
    assert 5 <= test < train < 60
    remarks = check(recipe)
    assert any(f"zero: asks {train} problems" in each and "zero.prompts=60" in each for each in remarks)
    assert any(f"evaluate: asks {test} problems" in each for each in remarks)
    work = {row.stage: row.work for row in estimate(recipe)}
    assert f"rollouts of {4 * train} in" in work["zero"]
    # two checkpoints: every problem once, and twice for the reach, the first five three times and once greedily; no harder ones
    assert work["evaluate"] == f"{2 * (3 * test + 5 * (3 + 1))} responses"
    assert not any("asks" in each for each in check(load("tiny")))


def test_general_data_alone_feed_no_reasoning_stage(tmp_path, problems):
    said = faults(tmp_path, problems(80, "helpful", "unsafe"))
    assert "no task of the recipe has reasoning problems to train on, as zero, cold_start" in said
    assert said.endswith("run without: 'stages=[base,evaluate]'")


@pytest.mark.parametrize("words", [["zero.variant=dapo"], ["task=['jsonl:nowhere.jsonl']"], ["stages=[]"]])
def test_a_dry_run_says_it_too(tmp_path, capsys, words):
    assert main(["run", "tiny", "--dry-run", "--run", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
