"""The pipeline on a table of fake stages: order, resume, and what happens to work that no longer fits."""

import json
import shutil
import sys
from types import ModuleType

import pytest
import torch

from training import pipeline
from training.errors import UserError
from training.pipeline import STAGES, Stage, parents_of, plan
from training.progress import Progress
from training.recipe import STAGE_NAMES, load
from training.run_dir import RunDir


class Killed(BaseException):
    """Stands for kill -9: nothing in the trainer catches it."""


class Work:
    """A fake stage of ten steps with a resume point every third; `die_at` kills it before that step."""

    def __init__(self):
        self.die_at = None
        self.steps = []

    def run(self, context):
        texts = [stage.data("data.jsonl").read_text() for stage in context.inputs.values()]
        weight = torch.zeros(3)
        state = context.stage.load_state()
        first = 0
        if state is not None:
            first, weight = state.step, state.tensors["weight"]
        for step in range(first, 10):
            if self.die_at == step:
                self.die_at = None
                raise Killed
            self.steps.append(step)
            weight = weight * 0.9 + context.config.lr * (step + len(texts) + context.recipe.seed)
            context.stage.log(step=step, value=float(weight.sum()), made_seconds=0.1)
            context.stage.add_samples([{"step": step, "text": "x" * step}])
            if step % 3 == 2:
                context.stage.save_state(step + 1, {"weight": weight}, {})
        context.stage.write_data("data.jsonl", [{"from": texts, "weight": weight.tolist()}])
        return {"value": float(weight.sum())}


@pytest.fixture
def works(monkeypatch):
    """base -> zero -> sft1 -> rl_reasoning, with evaluate over all of them; name -> Work."""
    names = ("base", "zero", "sft1", "rl_reasoning")
    works = {}
    for name in names:
        works[name] = Work()
        module = ModuleType(f"fake_{name}")
        module.run = works[name].run
        monkeypatch.setitem(sys.modules, f"fake_{name}", module)
    return works


def table(works):
    parents = {"base": (), "zero": ("base",), "sft1": ("base", "zero"), "rl_reasoning": ("sft1",)}
    return {
        name: Stage(f"the {name}", lambda recipe, name=name: parents[name], f"fake_{name}") for name in works
    }


@pytest.fixture
def run(works, tmp_path):
    def run(*overrides, folder="run", **options):
        recipe = load("tiny", [f"stages=[{','.join(works)}]", "zero.lr=1", *overrides])
        options.setdefault("progress", Progress(quiet=True))
        return pipeline.run(recipe, RunDir(tmp_path / folder), stages=table(works), **options)

    return run


def contents(folder):
    """Every file of a run by path, without what may differ: times, versions of code, memory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            text = path.read_text()
            if path.name == "done.json":
                record = json.loads(text)
                text = json.dumps([record["hash"], record["metrics"]])
            found[str(path.relative_to(folder))] = text
    return found


def test_all_run_once_in_order_then_nothing_runs(run, works):
    assert run() == ["base", "zero", "sft1", "rl_reasoning"]
    assert run() == []
    assert all(work.steps == list(range(10)) for work in works.values())


def test_a_killed_run_ends_like_one_that_was_not(run, works, tmp_path):
    run(folder="whole")
    for stage, moment in (("base", 0), ("base", 3), ("sft1", 2), ("sft1", 5), ("sft1", 9)):
        folder = f"{stage} {moment}"
        works[stage].die_at = moment
        works[stage].steps.clear()
        with pytest.raises(Killed):
            run(folder=folder)
        run(folder=folder)
        assert contents(tmp_path / folder) == contents(tmp_path / "whole"), folder
        # At most the steps since the last resume point are done twice.
        assert len(works[stage].steps) == 10 + moment % 3, folder


def test_a_run_killed_many_times_ends_the_same(run, works, tmp_path):
    run(folder="whole")
    for stage in ("base", "rl_reasoning"):
        for moment in (0, 2, 4, 4, 9):
            works[stage].die_at = moment
            with pytest.raises(Killed):
                run()
    run()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_setting_that_changed_is_refused_and_nothing_is_lost(run, works, tmp_path):
    run()
    before = contents(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        run("zero.lr=2")
    message = str(caught.value)
    assert "stage zero was made with zero.lr = 1.0 and now it is 2.0" in message
    assert "--redo zero" in message
    assert "\n" not in message
    assert contents(tmp_path / "run") == before


def test_redo_runs_the_stage_and_what_depends_on_it(run, tmp_path):
    run()
    assert run("zero.lr=2", redo=["zero"]) == ["zero", "sft1", "rl_reasoning"]
    run("zero.lr=2", folder="fresh")
    assert contents(tmp_path / "run") == contents(tmp_path / "fresh")


def test_redo_that_gives_the_same_output_stops_there(run):
    run()
    assert run(redo=["zero"]) == ["zero"]


def test_a_new_seed_needs_only_the_first_stage_to_be_named(run):
    run()
    with pytest.raises(UserError, match="stage base was made with seed = 0 and now it is 1"):
        run("seed=1")
    assert run("seed=1", redo=["base"]) == ["base", "zero", "sft1", "rl_reasoning"]


def test_half_finished_work_with_other_settings_is_refused(run, works):
    works["zero"].die_at = 5
    with pytest.raises(Killed):
        run()
    with pytest.raises(UserError, match=r"stage zero was made with zero\.lr = 1\.0 and now it is 2\.0"):
        run("zero.lr=2")
    works["zero"].steps.clear()
    assert run() == ["zero", "sft1", "rl_reasoning"]
    assert works["zero"].steps[0] == 3


def test_settings_that_do_not_change_results_may_change(run):
    run()
    assert run("zero.save_every=77") == []


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_an_output_that_changed_is_refused_by_name(run, tmp_path, damage):
    run()
    path = tmp_path / "run" / "base" / "data.jsonl"
    if damage == "changed":
        path.write_text("{}\n")
    else:
        path.unlink()
    with pytest.raises(UserError) as caught:
        run()
    assert f"{path} is missing or not what stage base wrote" in str(caught.value)
    assert "--redo base" in str(caught.value)
    with pytest.raises(
        UserError, match="stage zero reads .*data.jsonl, which is missing or not what stage base wrote"
    ):
        run(only="zero")
    assert run(redo=["base"]) == ["base"]


def test_an_input_from_another_run_is_refused(run, tmp_path):
    run()
    run("seed=1", folder="other")
    shutil.rmtree(tmp_path / "run" / "base")
    shutil.copytree(tmp_path / "other" / "base", tmp_path / "run" / "base")
    with pytest.raises(UserError, match="stage base was made with seed = 1 and now it is 0"):
        run()
    record = json.loads((tmp_path / "run" / "base" / "done.json").read_text())
    record["config"]["seed"] = 0
    (tmp_path / "run" / "base" / "done.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=r"stage zero was made from other inputs \(base = .* and now it is .*--redo zero"
    ):
        run()


def test_an_input_that_changes_while_the_run_goes_on_is_refused(run, works, tmp_path):
    """base was thrown away by hand: it is made again, differently, and zero is not silently replaced."""
    run()
    shutil.rmtree(tmp_path / "run" / "base")
    real = works["base"].run
    sys.modules["fake_base"].run = lambda context: (
        real(context),
        context.stage.write_data("data.jsonl", [7]),
    )[0]
    before = contents(tmp_path / "run" / "zero")
    with pytest.raises(
        UserError, match="stage zero was made from other inputs: run it again with --redo zero"
    ):
        run()
    assert contents(tmp_path / "run" / "zero") == before


def test_one_stage_alone_needs_its_inputs(run):
    with pytest.raises(
        UserError, match="stage zero needs base, which is not done: first run `python -m training stage"
    ):
        run(only="zero")
    assert run(only="base") == ["base"]
    assert run(only="zero") == ["zero"]


@pytest.mark.parametrize("options", [{"only": "zerro"}, {"redo": ["zerro"]}])
def test_an_unknown_stage_names_the_nearest(run, options):
    with pytest.raises(UserError, match="unknown stage 'zerro': did you mean 'zero'"):
        run(**options)


def test_a_run_in_use_is_refused(run, tmp_path):
    with RunDir(tmp_path / "run").lock(), pytest.raises(UserError, match="is in use by another process"):
        run()


def test_the_table_is_the_pipeline_of_the_recipes():
    assert tuple(STAGES) == STAGE_NAMES
    recipe = load("tiny")
    assert plan(recipe) == list(STAGE_NAMES)
    graph = {name: parents_of(name, recipe) for name in STAGES}
    assert graph["zero"] == ["base"]
    assert graph["cold_start"] == ["base", "zero"]
    assert graph["sft1"] == ["base", "cold_start"]
    assert graph["rl_all"] == ["sft2", "reward_models"]
    assert graph["distill"] == ["rejection", "rl_all"]
    assert {"base", "zero", "sft1", "rl_reasoning", "sft2", "rl_all", "distill"} <= set(graph["evaluate"])


def test_the_start_of_sft2_is_a_matter_of_the_recipe():
    assert parents_of("sft2", load("tiny", ["sft2.start=base"])) == ["base", "rejection"]
    assert parents_of("sft2", load("tiny", ["sft2.start=rl_reasoning"])) == ["rl_reasoning", "rejection"]
    assert parents_of("sft2", load("deepseek-r1")) == ["base", "rejection"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages=[zero]"], "stage zero needs base, which the recipe's list of stages leaves out"),
        (["judge.samples_from=[sft2]"], "stage judge cannot be made from sft2, which comes after it"),
        (["judge.samples_from=[sft3]"], "judge: unknown stage 'sft3': did you mean 'sft2'"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        plan(load("tiny", overrides))


def test_the_reward_stands_first_and_the_small_loss_is_explained(capsys):
    progress = Progress()
    with progress.grpo_bar(2, title="zero") as bar:
        bar.advance(loss=0.001, reward=1.25)
        bar.advance(loss=0.002, reward=1.5)
    with progress.grpo_bar(1, title="rl_all") as bar:
        bar.advance(loss=0.001, reward=1.0)
    shown = capsys.readouterr().out
    assert shown.count("near 0 by construction") == 1
    assert "zero 2/2" in shown
    assert shown.index("reward=1.5") < shown.index("loss=0.002")
