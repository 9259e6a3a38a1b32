"""Next-token training and GRPO: what is learnt, what carries a loss, resume bit for bit, and steps that are not finite."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import r1kernels
from tests.support.restored import cloned, restored
from training import prompts, rewards
from training.context import StageContext
from training.document import Document
from training.errors import UserError
from training.loops import grpo, next_token
from training.loops.loss import loss_arguments
from training.loops.optim import MAX_BAD_STEPS, Optimizer, learning_rate, save_due
from training.loops.passes import max_new_tokens
from training.model import build_model
from training.profile import profiled, profiling
from training.progress import Progress
from training.recipe import load
from training.rewards import Reward, Scored
from training.run_dir import StageDir
from training.sections import Grpo, Model, NextToken
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SIZES = Model(hidden_size=32, layers=2, heads=2, intermediate_size=32, moe_intermediate_size=16, experts=4)
DOCUMENTS = [Document(f"{a} plus {b} makes {a + b} .") for a in range(1, 7) for b in range(1, 7)]
PROBLEMS = [make_problem(a, 7, 9, "en") for a in (3, 5, 8, 9)]


def model(seed=0):
    return build_model(SIZES, TOKENIZER, seed)


same_model = restored(model)


def context(folder, config, name="stage"):
    stage = StageDir(folder)
    stage.begin({}, {})
    return StageContext(name, load("smoke"), config, stage, {}, Progress(quiet=True))


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in rows]


class Stop(Exception):
    """A kill in the middle of a run."""


OPTIMIZERS = [
    "adamw",
    pytest.param(
        "adamw_8bit",
        marks=pytest.mark.skipif(
            find_spec("bitsandbytes") is None,
            reason="bitsandbytes is not installed: pip install bitsandbytes",
        ),
    ),
]


# --- the learning rate and the guarded step ---


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # warm-up 2 of 6 steps: 1/2, 2/2 of 1.0, then over 4 steps from 1.0 towards 0.2
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1.0, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))]),
    ],
)
def test_the_learning_rate_by_hand(schedule, expected):
    found = [learning_rate(s, 6, lr=1.0, lr_end=0.2, schedule=schedule, warmup=2) for s in range(6)]
    assert found == pytest.approx(expected)


def test_a_step_that_is_not_finite_is_skipped_counted_and_at_last_fatal():
    layer = torch.nn.Linear(2, 2)
    optimizer = Optimizer(layer, weight_decay=0.0, grad_clip=1.0)

    def step(loss):
        layer.weight.grad = torch.ones_like(layer.weight)
        return optimizer.step(loss, 0.1).taken

    before = layer.weight.clone()
    assert not step(math.nan) and torch.equal(layer.weight, before)
    assert step(1.0) and not torch.equal(layer.weight, before)
    for _ in range(MAX_BAD_STEPS - 1):
        assert not step(math.inf)
    with pytest.raises(UserError, match=f"{MAX_BAD_STEPS} steps in a row"):
        step(math.nan)
    assert optimizer.skipped == MAX_BAD_STEPS + 1


@pytest.mark.parametrize(
    ("step", "every", "unsaved", "due"),
    [(4, 4, 0.0, True), (5, 4, 0.0, False), (5, 4, 601.0, True), (8, 4, 601.0, False), (5, 0, 601.0, False)],
)
def test_a_resume_point_is_due_by_steps_or_by_time_but_not_at_the_end(step, every, unsaved, due):
    assert save_due(step, 8, every, unsaved) is due


# --- next-token training ---


def test_the_first_loss_is_the_one_of_transformers(tmp_path):
    config = NextToken(steps=1, batch_size=len(DOCUMENTS), lr=0.0, lr_end=0.0)
    built = model()
    total, count = 0.0, 0
    for document in DOCUMENTS:
        ids = torch.tensor([[1, *TOKENIZER.encode(document.text, add_special_tokens=False), 2]])
        with torch.no_grad():
            total += float(built(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = next_token.train(built, TOKENIZER, DOCUMENTS, config, context(tmp_path / "a", config))
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_prompt_carries_no_loss_and_eos_does(tmp_path):
    """A model that has learnt the response knows it with its eos, and nothing of the prompt."""
    config = NextToken(steps=30, batch_size=4, lr=2e-2, lr_end=1e-3)
    built = model()
    documents = [Document("makes 7", prompts.ask("check check plus"))] * 4
    next_token.train(built, TOKENIZER, documents, config, context(tmp_path / "a", config))
    text = "user : check check plus assistant : makes 7"
    ids = torch.tensor([[1, *TOKENIZER.encode(text, add_special_tokens=False), 2]])
    logp = built(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert logp[7:].min() > -0.2  # makes, 7, eos
    assert logp[:7].max() < -1.0  # user : check check plus assistant :


def test_training_lowers_the_loss_and_evens_the_load(tmp_path):
    config = NextToken(steps=30, batch_size=16, lr=1e-2, lr_end=5e-4, bias_rate=2e-2)
    at = context(tmp_path / "a", config)
    next_token.train(model(), TOKENIZER, DOCUMENTS, config, at)
    rows = at.stage.metrics()
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    busiest = [row["expert_load"] for row in rows]
    assert sum(busiest[-10:]) < sum(busiest[:10])


def test_an_epoch_shows_every_document_once():
    seen = [i for step in range(5) for i in next_token.batch_of_step(10, 4, step, (0, "s"))]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_documents_that_are_too_long_are_cut_and_counted(tmp_path):
    config = NextToken(steps=1, batch_size=2, max_length=5)
    documents = [Document("1 plus 2 makes 3 ."), Document("7")]
    found = next_token.train(model(), TOKENIZER, documents, config, context(tmp_path / "a", config))
    assert found["truncated"] == 1
    with pytest.raises(UserError, match="no documents"):
        next_token.train(model(), TOKENIZER, [], config, context(tmp_path / "b", config))


def run_next_token(folder, config, stop_at=None):
    at = context(folder, config)
    built = model()
    if stop_at is not None:
        log = at.stage.log

        def log_until(**row):
            log(**row)
            if row["step"] == stop_at:
                raise Stop

        at.stage.log = log_until
    next_token.train(built, TOKENIZER, DOCUMENTS, config, at)
    return without_times(at.stage.metrics()), built.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_killed_pretraining_ends_as_if_it_had_not_been(tmp_path, optimizer):
    config = NextToken(steps=7, batch_size=10, lr=5e-3, save_every=2, optimizer=optimizer)
    expected, weights = run_next_token(tmp_path / "whole", config)
    for stop_at in (1, 2, 5):  # after a resume point, between two, and again
        with pytest.raises(Stop):
            run_next_token(tmp_path / "killed", config, stop_at)
    rows, resumed = run_next_token(tmp_path / "killed", config)
    assert rows == expected
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


# --- GRPO ---

CONFIG = Grpo(
    steps=4, prompts=4, group_size=4, minibatches=2, lr=3e-3, max_new_tokens=8, save_every=1, batch_size=8
)


SHORT = replace(CONFIG, group_size=2, max_new_tokens=5)


def share_of_makes(step, samples):
    word = TOKENIZER.convert_tokens_to_ids("makes")
    scored = []
    for sample in samples:
        value = sample.token_ids.count(word) / len(sample.token_ids)
        scored.append(Scored(sample, value, {"format": Reward(value, "share of makes")}))
    return scored


def share_of_even_ids(step, samples):
    """A reward with a spread in every group whatever the weights: where there is none, gradients are rounding alone."""
    values = [sum(each % 2 == 0 for each in sample.token_ids) / len(sample.token_ids) for sample in samples]
    return [Scored(s, v, {"format": Reward(v, "")}) for s, v in zip(samples, values, strict=True)]


def run_grpo(folder, config=CONFIG, reward=share_of_even_ids, stop_at=None, policy=None):
    at = context(folder, config)
    policy = policy or same_model()
    if stop_at is not None:
        whole = reward

        def reward(step, samples):
            if step == stop_at:
                raise Stop
            return whole(step, samples)

    found = grpo.train(policy, TOKENIZER, lambda step: PROBLEMS, prompts.chat, reward, config, at)
    return without_times(at.stage.metrics()), cloned(policy.state_dict()), found, at


def test_grpo_raises_the_reward(tmp_path):
    config = replace(CONFIG, steps=8, group_size=8, batch_size=64, lr=1.6e-2)
    rows, _, _, _ = run_grpo(tmp_path / "a", config, share_of_makes)
    assert rows[-1]["reward"] > 10 * rows[0]["reward"] and rows[-1]["reward"] > 0.1


def test_the_metrics_are_complete_and_consistent(tmp_path):
    rows, _, final, at = run_grpo(tmp_path / "a")
    named = {
        *(
            "reward",
            "reward/format",
            "reward_std",
            "zero_std_groups",
            "format",
            "language_consistency",
            "reward_errors",
        ),
        *(
            "step",
            "length",
            "finished",
            "loss",
            "kl",
            "entropy",
            "clip_low",
            "clip_high",
            "ratio_mean",
            "ratio_max",
        ),
        *("lr", "grad_norm", "expert_load", "skipped", "replay_agreement"),
        *("replay_agreement_old", "replay_agreement_reference"),
        *("staleness", "stale", "sampler_gap", "sampler_gap_max", "sampler_gap_share"),
    }
    assert named <= set(rows[0])
    # before the first update the sampler, the old policy and the reference are one model
    assert rows[0]["replay_agreement_old"] == rows[0]["replay_agreement_reference"] > 0.99
    assert 0 < rows[-1]["replay_agreement_reference"] < 1
    assert {
        "rollout_seconds",
        "reward_seconds",
        "old_logprob_seconds",
        "reference_logprob_seconds",
        "new_logprob_seconds",
        "update_seconds",
        "tokens_per_second",
        "rollout_tokens_per_second",
    } <= set(at.stage.metrics()[0])
    assert rows[0]["kl"] < 0.01  # of two minibatches, the first is still at the reference
    assert [row["lr"] for row in rows] == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert final["reward"] == rows[-1]["reward"]
    sample = at.stage.samples()[0]
    assert set(sample) >= {
        "step",
        "problem_id",
        "question",
        "text",
        "rewards",
        "reward",
        "advantage",
        "finished",
    }
    json.dumps(sample)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, optimizer):
    """With a loss of each kind beside another optimizer."""
    config = replace(
        SHORT,
        reference_every=2,
        save_every=2,
        steps=4,
        fused_loss=optimizer == "adamw",
        optimizer=optimizer,
    )
    expected, weights, _, whole = run_grpo(tmp_path / "whole", config, policy=model())
    for stop_at in (1, 3):
        with pytest.raises(Stop):
            run_grpo(tmp_path / "killed", config, stop_at=stop_at, policy=model())
    rows, resumed, _, killed = run_grpo(tmp_path / "killed", config, policy=model())
    assert rows == expected
    assert killed.stage.samples() == whole.stage.samples()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_equal_rewards_change_nothing_but_the_bias(tmp_path):
    def equal(step, samples):
        return [Scored(sample, 1.0, {}) for sample in samples]

    before = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    rows, after, _, _ = run_grpo(tmp_path / "a", replace(CONFIG, kl_coef=0.0, steps=1), equal)
    assert rows[0]["zero_std_groups"] == 1.0 and rows[0]["grad_norm"] == 0.0
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("e_score_correction_bias") for name in changed)


SPREAD = replace(CONFIG, keep_groups="spread", kl_coef=0.0, steps=1)


def only_of(number):
    """A reward with a spread for problem `number` of every four and none for the others."""

    def reward(step, samples):
        scored = []
        for index, sample in enumerate(samples):
            value = float(index % 2) if index // CONFIG.group_size % 4 == number else 1.0
            scored.append(Scored(sample, value, {"format": Reward(value, "")}))
        return scored

    return reward


def test_groups_without_spread_are_left_out_of_the_loss(tmp_path):
    rows, filtered, _, _ = run_grpo(tmp_path / "a", SPREAD, only_of(1))
    assert rows[0]["kept"] == 1 / 4 and rows[0]["zero_std_groups"] == 3 / 4
    assert rows[0]["grad_norm"] > 0
    rows, diluted, _, _ = run_grpo(tmp_path / "b", replace(SPREAD, keep_groups="all"), only_of(1))
    assert rows[0]["kept"] == 1.0
    assert any(not torch.equal(filtered[name], diluted[name]) for name in filtered)


def test_further_questions_are_sampled_until_enough_groups_have_a_spread(tmp_path):
    asked = []

    def problems(step):
        asked.append(step)
        return PROBLEMS

    def train(folder, config, reward):
        asked.clear()
        at = context(folder, config)
        grpo.train(model(), TOKENIZER, problems, prompts.chat, reward, config, at)
        return at.stage.metrics()[0]

    row = train(tmp_path / "a", replace(SPREAD, sampling_rounds=8), only_of(1))
    assert asked == [0, 1, 2, 3] and row["kept"] == 1 / 4, "four rounds give four groups, as many as prompts"
    row = train(tmp_path / "b", replace(SPREAD, sampling_rounds=2), only_of(1))
    assert asked == [0, 1] and row["kept"] == 1 / 4
    row = train(tmp_path / "c", replace(SPREAD, sampling_rounds=8), share_of_even_ids)
    assert len(asked) < 8 and row["kept"] <= 1


def test_a_step_without_any_spread_changes_nothing(tmp_path):
    before = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    rows, after, _, _ = run_grpo(tmp_path / "a", SPREAD, only_of(9))
    assert rows[0]["kept"] == 0.0 and rows[0]["zero_std_groups"] == 1.0
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_responses_that_were_cut_carry_no_loss_where_the_recipe_says_so(tmp_path):
    config = replace(CONFIG, steps=1, max_new_tokens=1, kl_coef=0.0, mask_truncated=True)
    before = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    rows, after, _, _ = run_grpo(tmp_path / "a", config)
    assert rows[0]["finished"] == 0.0
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows, after, _, _ = run_grpo(tmp_path / "b", replace(config, mask_truncated=False), only_of(1))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_sample_without_a_reward_is_left_out(tmp_path):
    def none_for_the_first(step, samples):
        scored = share_of_even_ids(step, samples)
        failed = Scored(samples[0], None, {"accuracy": Reward(None, "error: ValueError: broken")})
        return [failed, *scored[1:]]

    rows, _, _, _ = run_grpo(tmp_path / "a", replace(CONFIG, steps=1), none_for_the_first)
    assert rows[0]["reward_errors"] == 1
    assert math.isfinite(rows[0]["loss"]) and rows[0]["grad_norm"] > 1e-4


def test_a_policy_that_is_not_finite_stops_with_one_line(tmp_path):
    built = model()
    with torch.no_grad():
        built.model.layers[1].mlp.shared_experts.down_proj.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=f"not a finite number {MAX_BAD_STEPS} steps in a row"):
        run_grpo(tmp_path / "a", replace(CONFIG, steps=9), policy=built)


@pytest.mark.parametrize(
    ("ratio", "reduction"), [("sequence", "sequence"), ("output", "token"), ("sequence", "constant")]
)
def test_other_ratios_and_reductions_learn_too(tmp_path, ratio, reduction):
    config = replace(CONFIG, steps=1, ratio=ratio, reduction=reduction)
    rows, _, _, _ = run_grpo(tmp_path / "a", config)
    assert math.isfinite(rows[0]["loss"]) and rows[0]["grad_norm"] > 1e-4


@pytest.mark.parametrize(
    "changes",
    [{}, {"reduction": "token", "kl_coef": 0.0}, {"ratio": "output", "clip": 10.0}, {"ratio": "sequence"},
     {"variant": "cispo", "reduction": "constant"}],
    ids=["token", "no KL", "output", "sequence", "cispo"],
)  # fmt: skip
def test_the_fused_loss_takes_the_same_step(tmp_path, changes):
    config = replace(CONFIG, steps=1, micro_batch_tokens=60, **changes)  # several forward passes per update
    rows, weights, _, _ = run_grpo(tmp_path / "a", config)
    fused, fused_weights, _, _ = run_grpo(tmp_path / "b", replace(config, fused_loss=True))
    assert set(fused[0]) == set(rows[0])
    for name, value in rows[0].items():
        assert fused[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for name in weights:
        torch.testing.assert_close(fused_weights[name], weights[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"variant": "cispo", "clip": 0.3}, "clip_low: not used by variant 'cispo', got 0.3"),
        ({"variant": "reinforce", "ratio": "sequence"}, "ratio: not used by variant 'reinforce'"),
    ],
)
def test_an_option_that_the_loss_does_not_use_is_refused(changes, text):
    logp = torch.zeros(2, 3)
    arguments = loss_arguments(
        replace(CONFIG, kl_coef=0.0, **changes), {"num_sequences": 2, "num_tokens": 6, "max_length": 3}
    )
    with pytest.raises(ValueError, match=text):
        r1kernels.grpo_loss(logp, logp, torch.ones(2), torch.ones(2, 3, dtype=torch.bool), **arguments)


@pytest.mark.parametrize("variant", ["grpo", "dual_clip", "gmpo"])
def test_the_clip_and_the_ratio_of_a_recipe_that_sets_none_are_those_of_settings(variant):
    """The op's own defaults are left to it: they must be what the settings say."""
    logp, old = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 4)
    advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 4, dtype=torch.bool)
    totals = {"num_sequences": 2, "num_tokens": 8, "max_length": 4}
    left = loss_arguments(Grpo(variant=variant, kl_coef=0.0), totals)
    said = {"clip_low": Grpo.clip, "clip_high": Grpo.clip, "ratio": None if variant == "gmpo" else Grpo.ratio}
    expected = r1kernels.grpo_loss(logp, old, advantages, mask, **{**left, **said})
    assert torch.equal(r1kernels.grpo_loss(logp, old, advantages, mask, **left).loss, expected.loss)


@pytest.mark.parametrize(
    ("start", "steps", "step"), [(0, 3, 1), (0, 1, 0), (2, 3, 2)], ids=["second", "only", "last"]
)
def test_one_step_is_profiled(tmp_path, start, steps, step):
    """The second of a process, or the last where there is no second."""
    with profiling(True):
        for each in range(start, steps):
            assert not (tmp_path / "profile.txt").exists() or each > step
            with profiled(tmp_path, each, start, steps):
                torch.ones(2, 2) @ torch.ones(2, 2)
    written = (tmp_path / "profile.txt").read_text()
    assert written.startswith(f"step {step}\n") and "aten::mm" in written and "Self CPU time total" in written


def test_a_profile_changes_nothing(tmp_path):
    config = replace(SHORT, steps=2)
    with profiling(True):
        _, weights, _, at = run_grpo(tmp_path / "a", config)
    assert (at.stage.path / "profile.txt").read_text().startswith("step 1\n")
    assert at.stage.outputs() == []  # nothing that another stage reads
    with profiling(False):
        _, expected, _, at = run_grpo(tmp_path / "b", config)
    assert not (at.stage.path / "profile.txt").exists()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_routing_replay_can_be_turned_off(tmp_path):
    rows, _, _, _ = run_grpo(tmp_path / "a", replace(CONFIG, replay=False, steps=1))
    assert not any(name.startswith("replay_agreement") for name in rows[0])


def test_minibatches_of_uneven_micro_batches_are_one_batch(tmp_path):
    """The gradient of a step does not depend on how the responses are cut into forward passes."""
    config = replace(CONFIG, steps=1, minibatches=1)
    _, whole, _, _ = run_grpo(tmp_path / "a", config)
    _, pieces, _, _ = run_grpo(tmp_path / "b", replace(config, micro_batch_tokens=60))
    for name in whole:
        torch.testing.assert_close(whole[name], pieces[name], rtol=1e-3, atol=2e-4)


def test_the_length_limit_follows_the_step():
    config = Grpo(max_new_tokens=8, max_new_tokens_from={10: 16, 20: 32})
    assert [max_new_tokens(config, step) for step in (0, 9, 10, 19, 20, 99)] == [8, 8, 16, 16, 32, 32]


def test_rewards_of_the_trainer_are_scored_samples(tmp_path):
    """The seam to training.rewards: samples as the loop makes them, scored by the real terms."""
    from training.tasks import get_task

    task = get_task("arithmetic", steps=1, largest=29)

    def reward(step, samples):
        return rewards.score(samples, {"accuracy": 1.0, "format": 1.0}, task)

    rows, _, _, _ = run_grpo(tmp_path / "a", replace(CONFIG, steps=1), reward)
    assert rows[0]["accuracy"] == rows[0]["reward/accuracy"]
