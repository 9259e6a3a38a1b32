"""What a process of several sends and holds, against numbers worked by hand."""

import pytest

from training.cli import plan
from training.estimate import CPU, estimate, parameters
from training.exchange import Layout, Work, sent, shares
from training.recipe import load


def test_whole_models_send_their_gradients_around_a_ring():
    # 10 weights, 8 of them trained: 2 * 3/4 * 4 bytes * 8 = 48 bytes per update
    assert sent(10, 8, Work(3, 5, 7), Layout(4, 1), 4) == 3 * 48


def test_divided_models_send_weights_to_every_pass():
    # 3/4 of 100 weights: gathered twice in 2 bytes and reduced in 4; read once in 2; the copy in 4
    assert sent(100, 100, Work(1, 1, 0), Layout(1, 4), 2) == 75 * 8 + 75 * 4
    assert sent(100, 100, Work(1, 0, 3), Layout(1, 4), 2) == 3 * 75 * 2 + 75 * 4
    # two such models: each part is summed over both, 2 * 1/2 * 4 * 100 / 4 bytes
    assert sent(100, 100, Work(1, 1, 0), Layout(2, 4), 2) == 75 * 8 + 100 + 75 * 4


def test_a_dry_run_says_what_each_process_holds_sends_and_computes():
    recipe = load("tiny", ["device=cpu"])
    model, rows = parameters(recipe), estimate(recipe)
    whole = {row.stage: row for row in rows}
    two = {share.stage: share for share in shares(recipe, model, rows, Layout(2, 1), CPU)}
    four = {share.stage: share for share in shares(recipe, model, rows, Layout(1, 4), CPU)}
    assert set(two) == set(four) == {stage for stage in two if whole[stage].training_flops}
    zero = two["zero"]
    assert zero.step_bytes == recipe.zero.minibatches * 4 * model.trained
    assert zero.hours == pytest.approx(whole["zero"].hours(CPU) / 2)
    assert zero.memory_bytes == whole["zero"].memory_bytes + whole["zero"].step_bytes
    own = whole["zero"].memory_bytes / 4 + 4 * model.total
    assert four["zero"].memory_bytes == pytest.approx(own + whole["zero"].step_bytes)


def test_the_dry_run_of_one_process_speaks_of_no_others():
    one = plan.text(load("tiny", ["device=cpu"]))
    several = plan.text(load("tiny", ["device=cpu", "parallel.processes=4", "parallel.shard=2"]))
    assert "processes (" not in one
    assert "one of 4 processes (2 x 2: models side by side, processes of a model)" in several
