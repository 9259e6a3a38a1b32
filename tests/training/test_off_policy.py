"""The sampler against the policy that learns: the gap of their log-probs, weights of another step, and how those are weighed."""

from dataclasses import replace

import pytest
import torch

from training import engines, prompts
from training.context import StageContext
from training.engines.transformers import TransformersEngine
from training.errors import UserError
from training.loops import grpo
from training.loops.off_policy import corrections, sampler_gap
from training.loops.sample import Completion
from training.model import build_model, frozen_copy
from training.progress import Progress
from training.recipe import load
from training.rewards import Reward, Scored
from training.run_dir import StageDir
from training.sections import Grpo, Rollout
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
RECIPE = load("tiny")
PROBLEMS = [make_problem(a, 17, 60, "en") for a in (3, 15, 28, 9)]
CONFIG = Grpo(steps=3, prompts=4, group_size=4, minibatches=1, lr=2e-3, max_new_tokens=16, save_every=1)


def length_reward(step, samples):
    values = [float(len(set(one.token_ids))) for one in samples]
    return [
        Scored(one, value, {"spread": Reward(value, "")}) for one, value in zip(samples, values, strict=True)
    ]


def train(folder, policy, recipe=RECIPE, config=CONFIG):
    stage = StageDir(folder)
    stage.begin({}, {})
    context = StageContext("zero", recipe, config, stage, {}, Progress(quiet=True))
    grpo.train(policy, TOKENIZER, lambda step: PROBLEMS, prompts.chat, length_reward, config, context)
    return stage.metrics()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_of_tiny_gives_the_log_probs_of_the_trainer(tmp_path, temperature):
    rows = train(
        tmp_path / "a",
        build_model(RECIPE.model, TOKENIZER, 0),
        config=replace(CONFIG, temperature=temperature),
    )
    assert len(rows) == CONFIG.steps
    for row in rows:
        assert 0 < row["sampler_gap"] <= row["sampler_gap_max"] < 1e-4
        assert row["sampler_gap_share"] == row["staleness"] == row["stale"] == 0
        assert row["replay_agreement_old"] == 1.0


class Late(TransformersEngine):
    """Draws from the weights of the step before."""

    def update(self, model, version):
        held = getattr(self, "held", (frozen_copy(model), version))
        super().update(*held)
        self.held = (frozen_copy(model), version)


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(
        engines, "connect", lambda rollout, model, tokenizer, version=0: Late(model, tokenizer, version)
    )


def test_responses_of_older_weights_are_refused_before_anything_is_learnt_from_them(tmp_path, late):
    policy = build_model(RECIPE.model, TOKENIZER, 0)
    with pytest.raises(UserError, match="16 of 16 responses are of other weights .* version 1, got 0"):
        train(tmp_path / "a", policy)
    assert len(StageDir(tmp_path / "a").metrics()) == 1


def test_responses_of_older_weights_are_weighed_where_the_recipe_says_so(tmp_path, late):
    recipe = replace(RECIPE, rollout=Rollout(stale="correct"))
    rows = train(tmp_path / "a", build_model(RECIPE.model, TOKENIZER, 0), recipe)
    assert [row["staleness"] for row in rows] == [0, 1, 1] and rows[1]["stale"] == 1
    assert rows[0]["sampler_gap_max"] < 1e-4 < rows[1]["sampler_gap"]
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in rows)


def test_corrections_of_an_exact_sampler_change_nothing(tmp_path):
    plain, weighed = (
        train(
            tmp_path / stale,
            build_model(RECIPE.model, TOKENIZER, 0),
            replace(RECIPE, rollout=Rollout(stale=stale)),
            replace(CONFIG, steps=1),
        )
        for stale in ("refuse", "correct")
    )
    assert weighed[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[1.0, 2.0], [0.5]]),
        ("token_mask", [[1.0, 0.0], [0.5]]),
        ("sequence_truncate", [[2.0, 2.0], [0.5]]),
        ("sequence_mask", [[0.0, 0.0], [0.5]]),
    ],
)
def test_weights_are_how_much_likelier_the_policy_finds_a_token(mode, expected):
    drawn = [
        Completion(PROBLEMS[0], (1,), (5, 6), "", 0, False, (-1.0, -4.0)),
        Completion(PROBLEMS[0], (1,), (5,), "", 1, False, (-1.0,)),
    ]
    old = [torch.tensor([-1.0, -1.0]), torch.tensor([-1.0 - torch.tensor(2.0).log()])]
    found = corrections(drawn, old, Rollout(stale="correct", importance_weights=mode, importance_cap=2.0))
    assert [weights.tolist() for weights in found] == [pytest.approx(row) for row in expected]
    gap = sampler_gap(drawn, old)
    assert gap["sampler_gap_max"] == pytest.approx(3.0)
    assert gap["sampler_gap"] == pytest.approx((3.0 + 0.6931) / 3, abs=1e-3)
    assert gap["sampler_gap_share"] == pytest.approx(2 / 3)
