"""kill -9 at any moment, the same command again: every number but times is that of a run that was never stopped.

The fast tests kill real processes, forked from this one: small stages of the same shape as the real ones, and then every real
stage that samples or trains something small. The slow one kills the whole recipe `smoke` in every stage.
"""

import functools
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.support.runs import assert_same, exit_code, lines, numbers, run_and_kill, run_to_the_end
from training import pieces, pipeline, preferences, seeding
from training.pipeline import Stage
from training.progress import Progress
from training.recipe import STAGE_NAMES, load
from training.run_dir import RunDir
from training.stages import distill
from training.tasks.general import GeneralTask


def generator(*key):
    return torch.Generator().manual_seed(seeding.key(*key))


def small_work(context):
    layer = torch.nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 8, generator=generator(context.recipe.seed, context.name)))
        layer.bias.zero_()
    state = context.stage.load_state()
    start = 0
    if state is not None:
        start = state.step
        layer.load_state_dict({name: state.tensors[name] for name in ("weight", "bias")})
    for step in range(start, 40):
        x = torch.randn(4, 8, generator=generator(context.recipe.seed, context.name, step))
        loss = (layer(x) - x).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        time.sleep(0.01)
        context.stage.log(step=step, loss=loss, update_seconds=time.perf_counter())
        context.stage.add_samples([{"step": step, "text": f"{float(x.sum()):.9f}"}])
        if step % 7 == 6:
            context.stage.save_state(step + 1, layer.state_dict(), {"step": step})
    before = [row for stage in context.inputs.values() for row in stage.read_data("data.jsonl")]
    context.stage.write_data("data.jsonl", [{"weights": layer.weight.tolist(), "inputs": before}])
    return {"loss": loss.item()}


def test_small_stages_killed_again_and_again_give_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "small_work", SimpleNamespace(run=small_work))
    stages = {
        "base": Stage("first", lambda recipe: (), "small_work"),
        "zero": Stage("second", lambda recipe: ("base",), "small_work"),
    }
    recipe = load("tiny", ["stages=[base, zero]"])
    whole, run = tmp_path / "whole", tmp_path / "killed"

    def work(folder):
        pipeline.run(recipe, RunDir(folder), stages=stages, progress=Progress(quiet=True))

    work(whole)
    for stage, count in (("base", 1), ("base", 17), ("base", 33), ("zero", 8), ("zero", 30)):
        metrics = run / stage / "metrics.jsonl"
        due = lambda path=metrics, count=count: lines(path) >= count  # noqa: E731
        assert exit_code(functools.partial(work, run), due) == -signal.SIGKILL
    work(run)
    assert_same(numbers(run), numbers(whole))
    assert lines(run / "zero" / "metrics.jsonl") == 40
    assert not list(run.rglob("state*"))


SETTINGS = [
    *(f"{stage}.max_new_tokens=8" for stage in STAGE_NAMES if stage not in ("base", "sft1", "sft2")),
    *(f"{stage}.{word}" for stage in ("zero", "rl_reasoning", "rl_all") for word in ("steps=1", "prompts=4", "group_size=4")),
    "base.steps=8", "base.batch_size=16",
    "cold_start.prompts=8", "cold_start.batch_size=8", "cold_start.filters=[]",
    "judge.prompts=8", "judge.steps=6", "judge.batch_size=8",
    "rejection.prompts=12", "rejection.batch_size=16", "rejection.filters=[]",
    "reward_models.prompts=24", "reward_models.unsafe_samples=2", "reward_models.steps=4",
    "distill.batch_size=8", "distill.filters=[]", "distill.students.qwen2.epochs=1", "distill.students.llama.epochs=1",
    "evaluate.problems=4", "evaluate.k_problems=2", "evaluate.reach_problems=2", "evaluate.splits=[test]",
]  # fmt: skip


def work(folder, stage, killed_at=None):
    """Does the stage, with a line in `calls` in the folder for every piece that is sampled. killed_at: pieces that are kept when
    the process is killed, with the next one drawn and not yet kept."""
    sample = pieces.sample

    def counted(*arguments, **settings):
        with open(folder / "calls", "a") as file:
            file.write("a piece\n")
        drawn = sample(*arguments, **settings)
        if killed_at == len(list((folder / stage).glob("pieces/*"))):
            os.kill(os.getpid(), signal.SIGKILL)
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "sample", counted)
        pipeline.run(load("smoke", SETTINGS), RunDir(folder), stage, progress=Progress(quiet=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all stages that was never stopped, and the pieces that every stage sampled."""
    folder, sampled = tmp_path_factory.mktemp("whole"), {}
    general = GeneralTask.problems
    with pytest.MonkeyPatch.context() as patch:
        # small pieces, a few of the general questions, and little of what follows the samples: no one is killed there
        patch.setattr(pieces, "BATCHES", 1)
        patch.setattr(GeneralTask, "problems", lambda task, split: general(task, split)[::16])
        patch.setattr(distill, "UNSEEN_PROBLEMS", 8)
        # so short a training gives good and bad responses by chance alone
        patch.setattr(preferences, "oracle", lambda problem, response: len(response.summary or "") % 2 == 1)
        for stage in STAGE_NAMES:
            before = lines(folder / "calls")
            work(folder, stage)
            sampled[stage] = lines(folder / "calls") - before
        yield folder, sampled


@pytest.mark.parametrize(
    "stage", ["cold_start", "judge", "rejection", "reward_models", "distill", "evaluate"]
)
def test_a_stage_killed_while_it_samples_goes_on_with_the_next_piece(tmp_path, whole, stage):
    """Every piece is sampled once, but for the one that was under way at each kill; one stage is killed twice."""
    folder, sampled = whole
    count, run = sampled[stage], tmp_path / "killed"
    for name in STAGE_NAMES[: STAGE_NAMES.index(stage)]:
        shutil.copytree(folder / name, run / name)
    shutil.copy(folder / "recipe.yaml", run / "recipe.yaml")
    assert count >= 4
    kills = [count // 2, count - 1] if stage == "rejection" else [count // 2]
    for killed_at in kills:
        assert exit_code(functools.partial(work, run, stage, killed_at)) == -signal.SIGKILL
    assert exit_code(functools.partial(work, run, stage)) == 0
    expected = numbers(folder)
    assert_same(numbers(run), {name: expected[name] for name in numbers(run)})
    assert lines(run / "calls") == count + len(kills)
    assert not (run / stage / "pieces").exists()


@pytest.mark.slow
def test_smoke_killed_in_every_stage_gives_the_same_numbers(tmp_path):
    def command(name):
        return [sys.executable, "-m", "training", "run", "smoke", "--run", str(tmp_path / name)]

    run_to_the_end(command("whole"))
    whole, run = tmp_path / "whole", tmp_path / "killed"
    kills = {}
    for stage in STAGE_NAMES:
        # In the middle of the stage by its metrics; a stage that logs little is killed when it begins to write.
        middle = max(1, lines(whole / stage / "metrics.jsonl") // 2)

        def due(stage=stage, middle=middle):
            there = (run / stage).glob("**/metrics.jsonl")  # those of parts under way too
            written = sum(map(lines, there))
            return written >= middle if middle > 1 else (run / stage / "started.json").is_file()

        kills[stage] = run_and_kill(command("killed"), due)
    assert all(kills.values()), f"stages that were not killed in time: {kills}"
    run_to_the_end(command("killed"))
    assert_same(numbers(run), numbers(whole))
