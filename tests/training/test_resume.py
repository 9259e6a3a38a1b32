"""kill -9 at any moment, the same command again: every number but times is that of a run that was never stopped.

The fast tests kill real processes: small stages of the same shape as the real ones, and then every real stage that
samples or trains something small. The slow one kills the whole recipe `smoke` in every stage.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.support.runs import ROOT, assert_same, lines, numbers, run_and_kill, run_to_the_end, wait_for
from training.recipe import STAGE_NAMES

# A program forks a process for every line on its input, which does what the line says, and prints the id of that process
# and later its exit code: torch is imported once, and kill -9 still hits a process of its own.
SMALL = """
import os, sys, time, traceback, types
import torch
from training import pipeline, seeding
from training.pipeline import Stage
from training.progress import Progress
from training.recipe import load
from training.run_dir import RunDir

def _generator(*key):
    return torch.Generator().manual_seed(seeding.key(*key))

def work(context):
    layer = torch.nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 8, generator=_generator(context.recipe.seed, context.name)))
        layer.bias.zero_()
    state = context.stage.load_state()
    start = 0
    if state is not None:
        start = state.step
        layer.load_state_dict({name: state.tensors[name] for name in ("weight", "bias")})
    for step in range(start, 40):
        x = torch.randn(4, 8, generator=_generator(context.recipe.seed, context.name, step))
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

for name in ("base", "zero"):
    sys.modules[f"work_{name}"] = types.SimpleNamespace(run=work)
table = {
    "base": Stage("first", lambda recipe: (), "work_base"),
    "zero": Stage("second", lambda recipe: ("base",), "work_zero"),
}
recipe = load("tiny", ["stages=[base, zero]"])

def do(folder):
    pipeline.run(recipe, RunDir(folder), stages=table, progress=Progress(quiet=True))
"""

# The real stages: a line is a folder and the stage to run there. `calls` in the folder gets a line for every piece that is
# sampled. An eighth of the general questions is enough, and little of what follows the samples: no one is killed there.
REAL = """
from training import pieces, pipeline
from training.check import check
from training.progress import Progress
from training.recipe import load
from training.run_dir import RunDir
from training.stages import distill
from training.tasks.general import GeneralTask

distill.UNSEEN_PROBLEMS = 8
general = GeneralTask.problems
GeneralTask.problems = lambda task, split: general(task, split)[::8]
recipe = load("smoke", [
    "base.steps=60", "base.batch_size=32", "zero.steps=2", "cold_start.prompts=32",
    "cold_start.batch_size=8", "cold_start.filters=[]", "rl_reasoning.steps=2",
    "judge.prompts=24", "rejection.prompts=48", "rejection.batch_size=16", "rejection.filters=[]",
    "reward_models.prompts=24", "reward_models.unsafe_samples=2", "reward_models.steps=4", "rl_all.steps=2",
    "distill.batch_size=8", "distill.filters=[]", "distill.students.qwen2.epochs=1", "distill.students.llama.epochs=1",
    "evaluate.problems=8", "evaluate.k_problems=4", "evaluate.batch_size=32", "evaluate.splits=[test]",
])
check(recipe)  # reads the tasks once for all children

def do(line):
    folder, _, stage = line.partition(" ")
    sample = pieces.sample
    def counted(*arguments, **settings):
        with open(folder + "/calls", "a") as file:
            file.write("a piece\\n")
        return sample(*arguments, **settings)
    pieces.sample = counted
    pipeline.run(recipe, RunDir(folder), stage, progress=Progress(quiet=True))
"""

SERVE = """
import importlib, os, sys, traceback

importlib.import_module("training.check")  # all that a child would import
for name in ("base", "zero", "cold_start", "sft", "judge", "rejection", "reward_models", "rl_all", "distill", "evaluate"):
    importlib.import_module(f"training.stages.{name}")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            do(line.strip())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def serving(text, folder):
    """do(line, due=None): lets the program work on the line to the end or until `due()`, and returns the exit code."""
    program = folder / "program.py"
    program.write_text(text + SERVE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(program)],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def do(line, due=None):
            server.stdin.write(f"{line}\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            if due is not None:
                wait_for(due)
                os.kill(child, signal.SIGKILL)
            return int(server.stdout.readline())

        yield do
        server.stdin.close()


@pytest.fixture
def small_run(tmp_path):
    with serving(SMALL, tmp_path) as do:
        yield do


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """The server of real stages, a run of all of them that was never stopped, and the pieces that every stage sampled."""
    folder = tmp_path_factory.mktemp("real")
    whole = folder / "whole"
    whole.mkdir()
    pieces = {}
    with serving(REAL, folder) as do:
        for stage in STAGE_NAMES:
            before = lines(whole / "calls")
            assert do(f"{whole} {stage}") == 0
            pieces[stage] = lines(whole / "calls") - before
        yield do, whole, pieces


def test_small_stages_killed_again_and_again_give_the_same_numbers(tmp_path, small_run):
    whole, run = tmp_path / "whole", tmp_path / "killed"
    assert small_run(whole) == 0
    for stage, count in (("base", 1), ("base", 17), ("base", 33), ("zero", 8), ("zero", 30)):
        due = functools.partial(
            lambda path, count: lines(path) >= count, run / stage / "metrics.jsonl", count
        )
        assert small_run(run, due) == -signal.SIGKILL
    assert small_run(run) == 0
    assert_same(numbers(run), numbers(whole))
    assert lines(run / "zero" / "metrics.jsonl") == 40
    assert not list(run.rglob("state*"))


@pytest.mark.parametrize(
    "stage", ["cold_start", "judge", "rejection", "reward_models", "distill", "evaluate"]
)
def test_a_stage_killed_while_it_samples_goes_on_with_the_next_piece(tmp_path, real_run, stage):
    """Killed twice: every piece is sampled once, but for the one that was under way at each kill."""
    do, whole, sampled = real_run
    pieces, run = sampled[stage], tmp_path / "killed"
    for name in STAGE_NAMES[: STAGE_NAMES.index(stage)]:
        shutil.copytree(whole / name, run / name)
    shutil.copy(whole / "recipe.yaml", run / "recipe.yaml")
    assert pieces >= 4
    for killed_at in (pieces // 2, pieces - 1):
        assert do(f"{run} {stage}", lambda n=killed_at: len(list((run / stage).glob("pieces/*"))) >= n) < 0
    assert do(f"{run} {stage}") == 0
    expected = numbers(whole)
    assert_same(numbers(run), {name: expected[name] for name in numbers(run)})
    assert lines(run / "calls") <= pieces + 2
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
