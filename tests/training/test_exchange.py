"""What a process of several sends and holds, against numbers worked by hand."""

import pytest

from training.cli import plan
from training.estimate import CPU, Estimate, estimate, parameters
from training.exchange import Layout, Work, fitting, held, sent, shares
from training.model import build_model
from training.recipe import load
from training.tokenizer import build_tokenizer


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
    assert four["zero"].memory_bytes == pytest.approx(own + whole["zero"].divided_step_bytes)


def test_a_divided_model_gathers_two_layers_and_holds_the_gradient_of_one():
    """Beside what the passes keep, in 4 bytes; embeddings and head stay for a whole pass, with their gradient."""
    recipe = load("tiny", ["device=cpu"])
    model, (zero,) = parameters(recipe), [row for row in estimate(recipe) if row.stage == "zero"]
    real = build_model(recipe.model, build_tokenizer(), seed=0)
    layers = [sum(each.numel() for each in layer.parameters()) for layer in real.model.layers]
    outside = sum(each.numel() for each in real.parameters()) - sum(layers)
    kept = zero.step_bytes - 4 * max(each.numel() for each in real.parameters())
    assert zero.divided_step_bytes == kept + 4 * (3 * max(layers) + 2 * outside)
    assert model.ends == outside


def test_the_fewest_processes_that_hold_every_stage_and_what_is_in_the_way():
    zero = Estimate("zero", [], "", 0, 0, 0, 1.0, 10, 160, step_bytes=50, divided_step_bytes=30)
    drawn = Estimate("rejection", [], "", 0, 0, 0, 0.0, 10, 40)
    assert [held(zero, shard) for shard in (1, 2, 4)] == [210, 80 + 40 + 30, 40 + 40 + 30]
    assert held(drawn, 4) == 40  # what draws is not divided
    assert fitting([zero, drawn], 210) == 1
    assert fitting([zero, drawn], 110) == 4
    assert fitting([zero, drawn], 70) is None  # the copy and a step alone are that much


def test_the_dry_run_of_one_process_speaks_of_no_others():
    one = plan.text(load("tiny", ["device=cpu"]))
    several = plan.text(load("tiny", ["device=cpu", "parallel.processes=4", "parallel.shard=2"]))
    assert "processes (" not in one
    assert "one of 4 processes (2 x 2: models side by side, processes of a model)" in several
