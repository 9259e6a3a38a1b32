"""Warnings: each kind once, kept for the report, and told after the same step by a run that goes on."""

import io

import pytest

from training import notices, pipeline
from training.loops.watch import PATIENCE, Watch
from training.pipeline import Stage
from training.progress import Progress
from training.recipe import load
from training.report.tables import warnings as warnings_html
from training.run_dir import RunDir

FINE = {"reward_spread": 1.0, "zero_std_groups": 0.5, "reward_errors": 0}
SIGNS = {
    "flat_reward": {"reward_spread": 0.0, "zero_std_groups": 1.0},
    "no_spread": {"zero_std_groups": 1.0},
}


@pytest.fixture
def heard():
    kinds = []
    with notices.listening(lambda kind, text: kinds.append((kind, text))):
        yield kinds


def test_a_stage_keeps_its_warnings_and_says_each_kind_once(tmp_path, monkeypatch):
    def work(context):
        for seen in (5, 6):
            notices.warn("documents_cut", f"{seen} of 8 documents are <cut>")
        context.stage.save_state(1, {}, {})
        if stop:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(Stage, "run", lambda stage, context: work(context))
    run, out = RunDir(tmp_path / "run"), io.StringIO()
    recipe = load("smoke", ["stages=[base]"])
    stop = True
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, run, progress=Progress(out))
    stop = False
    pipeline.run(recipe, run, progress=Progress(out))
    assert out.getvalue().count("warning: base: 5 of 8 documents are <cut>\n") == 1
    assert out.getvalue().count("warning") == 1
    assert run.stage("base").warnings() == [{"kind": "documents_cut", "text": "5 of 8 documents are <cut>"}]
    assert run.stage("base").outputs() == [], "no output that later stages depend on"
    page = warnings_html(run)
    assert page.count("<li>") == 1 and "&lt;cut&gt;" in page


@pytest.mark.parametrize("kind", SIGNS)
def test_a_sign_that_lasts_is_warned_of_and_one_good_step_takes_it_back(heard, kind):
    watch = Watch()
    for row in [SIGNS[kind]] * (PATIENCE - 1) + [{}] + [SIGNS[kind]] * (PATIENCE - 1):
        watch.see(FINE | row)
    assert heard == []
    watch.see(FINE | SIGNS[kind])
    assert [found for found, _ in heard] == [kind]


def test_an_error_of_a_reward_is_warned_of_at_once_with_its_text(heard):
    Watch().see(FINE | {"reward_errors": 3, "reward_error": "accuracy: error: ValueError: bad"})
    ((kind, text),) = heard
    assert kind == "reward_errors" and "accuracy: error: ValueError: bad" in text


def test_a_run_that_goes_on_counts_the_steps_before(heard):
    flat = FINE | SIGNS["flat_reward"]
    Watch([flat] * (PATIENCE - 1)).see(flat)
    assert [kind for kind, _ in heard] == ["flat_reward"]


def test_outside_of_a_stage_a_warning_goes_to_stderr(capsys):
    notices.warn("anything", "it is so")
    assert capsys.readouterr().err == "warning: it is so\n"
