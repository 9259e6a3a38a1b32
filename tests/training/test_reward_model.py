"""Reward models: losses against hand-worked numbers, the data they learn from, training, saving and resuming."""

import math

import pytest
import torch

from training import checkpoint, reward_model
from training.context import StageContext
from training.errors import UserError
from training.model import build_model, load
from training.progress import Progress
from training.recipe import Model, Recipe, RewardModels
from training.reward_model import Pair, Point
from training.run_dir import StageDir
from training.tasks import get_task
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SIZES = Model(hidden_size=32, layers=2, intermediate_size=64, moe_intermediate_size=16, experts=4, heads=2)
CAPITALS = [p for p in get_task("general").problems("train") if p.level == "capital" and p.language == "en"]


def context(path, save_every=0, steps=30):
    stage = StageDir(path)
    stage.begin({}, {})
    config = RewardModels(steps=steps, batch_size=16, lr=5e-3, lr_end=1e-3, save_every=save_every)
    return StageContext("reward_models", Recipe(), config, stage, {}, Progress(quiet=True))


def start():
    return reward_model.from_language_model(build_model(SIZES, TOKENIZER, 0))


def pairs():
    return [Pair(p, f"it is {p.reference} {p.reference}", "i cannot tell it no") for p in CAPITALS]


def test_pairwise_loss_is_minus_log_sigmoid_of_the_difference():
    value = reward_model.pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert value.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)


def test_pointwise_loss_is_binary_cross_entropy():
    value = reward_model.pointwise_loss(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0]))
    assert value.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)


def test_a_new_reward_model_is_the_body_of_the_language_model_under_a_head_of_zeros():
    language_model = build_model(SIZES, TOKENIZER, 0)
    before = torch.random.get_rng_state()
    model = reward_model.from_language_model(language_model)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, tensor in language_model.model.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name
    assert reward_model.scorer(model, TOKENIZER)([(CAPITALS[0], "it is paris")]) == [0.5]


def test_rewards_do_not_depend_on_what_else_is_in_the_batch():
    model = start()
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    items = [(CAPITALS[0], "it is paris"), (CAPITALS[1], "i cannot tell it no it is not this")]
    together = reward_model.rewards(model, TOKENIZER, items)
    alone = torch.cat([reward_model.rewards(model, TOKENIZER, [item]) for item in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_training_on_pairs_orders_them_and_centres_the_scores(tmp_path):
    model = start()
    assert reward_model.accuracy(model, TOKENIZER, pairs()) == 0.0
    reward_model.train(model, TOKENIZER, pairs(), context(tmp_path).config, context(tmp_path))
    assert reward_model.accuracy(model, TOKENIZER, pairs()) == 1.0
    scores = reward_model.scorer(model, TOKENIZER)
    good = scores([(pair.problem, pair.chosen) for pair in pairs()])
    bad = scores([(pair.problem, pair.rejected) for pair in pairs()])
    assert min(good) > 0.5 > max(bad)
    checkpoint.save_model(model, TOKENIZER, tmp_path / "saved")
    loaded, tokenizer = load(tmp_path / "saved")
    assert loaded.config.reward_offset == model.config.reward_offset
    assert reward_model.scorer(loaded, tokenizer)([(pairs()[0].problem, pairs()[0].chosen)]) == pytest.approx(
        good[:1]
    )


def test_training_on_points_tells_unsafe_from_safe(tmp_path):
    points = [Point(p, f"it is {p.reference}", False) for p in CAPITALS]
    points += [Point(p, "i cannot tell it", True) for p in CAPITALS]
    model = start()
    reward_model.train(model, TOKENIZER, points, context(tmp_path).config, context(tmp_path))
    assert reward_model.accuracy(model, TOKENIZER, points) == 1.0
    assert model.config.reward_offset == 0.0


def test_a_training_that_is_cut_off_goes_on_to_the_same_weights(tmp_path):
    def of(name):
        return context(tmp_path / name, save_every=3, steps=8)

    whole = start()
    reward_model.train(whole, TOKENIZER, pairs(), of("a").config, of("a"))
    cut = of("b")

    class Stop(Exception):
        pass

    log = cut.stage.log

    def log_until_4(**metrics):
        if metrics["step"] == 4:
            raise Stop
        log(**metrics)

    cut.stage.log = log_until_4
    with pytest.raises(Stop):
        reward_model.train(start(), TOKENIZER, pairs(), cut.config, cut)
    resumed = start()
    again = of("b")
    reward_model.train(resumed, TOKENIZER, pairs(), again.config, again)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert again.stage.metrics() == StageDir(tmp_path / "a").metrics()


def test_no_data_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no labelled responses"):
        reward_model.train(start(), TOKENIZER, [], context(tmp_path).config, context(tmp_path))


def test_pairs_are_of_one_problem_and_each_text_counts_once():
    first, second = CAPITALS[:2]
    labelled = [
        (first, "a", True),
        (first, "a", True),
        (first, "b", False),
        (first, "c", False),
        (second, "d", True),
    ]
    assert set(reward_model.make_pairs(labelled, 10, (0,))) == {Pair(first, "a", "b"), Pair(first, "a", "c")}
    assert len(reward_model.make_pairs(labelled, 1, (0,))) == 1


def test_half_of_the_pairs_are_close_ones():
    problem = CAPITALS[0]
    labelled = [(problem, "it is paris", True), (problem, "it is oslo", False)]
    labelled += [(problem, f"i cannot tell it {number}", False) for number in range(20)]
    for seed in range(5):
        rejected = [pair.rejected for pair in reward_model.make_pairs(labelled, 2, (seed,))]
        assert len(rejected) == 2
        assert rejected[0] == "it is oslo"


def test_points_are_balanced_and_distinct():
    problem = CAPITALS[0]
    labelled = [(problem, "a", True), (problem, "a", True), (problem, "b", False), (problem, "c", False)]
    points = reward_model.make_points(labelled, (0,))
    assert sorted(point.label for point in points) == [False, True]
