"""Truncated sampling in RL: the sets as they were sampled, log-probs among them in every pass, and a gap that stops the run."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from tests.support.restored import cloned
from tests.training.test_engines import build, draw, requests_of, texts
from tests.training.test_loops import (
    CONFIG,
    PROBLEMS,
    TOKENIZER,
    Stop,
    context,
    run_grpo,
    same_model,
)
from training import prompts
from training.engines import EngineError, Kept, Output
from training.engines.transformers import TransformersEngine
from training.loops import gap, grpo
from training.recipe import load
from training.rewards import Reward, Scored

TRUNCATED = replace(CONFIG, top_p=0.8, top_k=40, temperature=0.9)


def distinct_tokens(step, samples):
    values = [len(set(one.token_ids)) / 8 for one in samples]
    return [
        Scored(one, value, {"spread": Reward(value, "")}) for one, value in zip(samples, values, strict=True)
    ]


def trained(folder, config=TRUNCATED, policy=None, **recipe):
    """The metrics of a run of GRPO."""
    at = context(folder, config)
    at.recipe = replace(at.recipe, **recipe)
    grpo.train(
        policy or same_model(), TOKENIZER, lambda step: PROBLEMS, prompts.chat, distinct_tokens, config, at
    )
    return at.stage.metrics()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt2", "mamba"])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, 0), (1.0, 5), (0.6, 9)])
def test_the_sets_are_those_of_transformers_warpers(family, top_p, top_k):
    policy = (
        build(family, {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2})
        if family == "mamba"
        else build(family)
    )
    asked = requests_of(texts(1, 9), samples=4)
    params = {"temperature": 1.3, "top_p": top_p, "top_k": top_k, "batch_size": 5}
    for request, output in zip(asked, draw(policy, asked, record_kept=True, **params), strict=True):
        first = len(request.prompt_ids)
        text = torch.tensor([request.prompt_ids + output.token_ids])
        with torch.no_grad():
            scores = policy(input_ids=text).logits[0, first - 1 : -1].double() / 1.3
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        ids, offsets = output.kept
        assert (ids.dtype, offsets.tolist()[0], len(offsets)) == (torch.int32, 0, len(output.token_ids) + 1)
        for token, row in enumerate(scores):
            assert output.kept.of(token).tolist() == row.isfinite().nonzero().squeeze(1).tolist()


def test_whoever_asks_for_none_or_draws_from_all_gets_none():
    policy, asked = build("gpt2"), requests_of(texts(1), samples=2)
    for params in ({"top_k": 5}, {"record_kept": True}, {"record_kept": True, "top_k": 5, "temperature": 0}):
        assert all(output.kept is None for output in draw(policy, asked, **params))
    for output in draw(policy, asked, record_kept=True, top_k=64):
        assert len(output.kept.ids) == 0 and not output.kept.offsets.any()


@pytest.mark.parametrize(
    ("changes", "shared_prefix"),
    [({}, True), ({}, False), ({"fused_loss": True}, True), ({"old_logprobs": "sampler"}, False)],
    ids=str,
)
def test_a_truncated_sampler_is_scored_without_a_gap_and_its_ratios_are_1(tmp_path, changes, shared_prefix):
    config = replace(TRUNCATED, minibatches=1, steps=2, **changes)
    rows = trained(tmp_path / "a", config, shared_prefix=shared_prefix)
    for row in rows:
        assert 0 < row["sampler_gap_max"] < 2e-5
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert row["entropy"] < math.log(40)
    assert rows[-1]["kl"] > 0 and rows[-1]["grad_norm"] > 0


def test_a_killed_run_with_kept_sets_ends_as_if_it_had_not_been(tmp_path):
    config = replace(TRUNCATED, save_every=1, steps=2)
    expected, weights, _, _ = run_grpo(tmp_path / "whole", config, distinct_tokens)
    with pytest.raises(Stop):
        run_grpo(tmp_path / "killed", config, distinct_tokens, stop_at=1)
    rows, resumed, _, _ = run_grpo(tmp_path / "killed", config, distinct_tokens)
    assert rows == expected
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_log_probs_of_the_sampler_train_as_recomputed_ones_do(tmp_path):
    """Two minibatches, so that the second one is off the policy that drew."""
    runs = {
        how: trained(tmp_path / how, replace(TRUNCATED, old_logprobs=how, steps=2))
        for how in ("recomputed", "sampler")
    }
    for mine, theirs in zip(runs["sampler"], runs["recomputed"], strict=True):
        assert "old_logprob_seconds" in theirs and "old_logprob_seconds" not in mine
        assert 0 < mine["sampler_gap_max"] < 2e-5
        for name in ("reward", "loss", "kl", "ratio_mean", "ratio_max", "clip_low", "clip_high", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        # of one minibatch of two, and of both
        assert mine["entropy"] == pytest.approx(theirs["entropy"], rel=0.2)


def test_with_log_probs_of_the_sampler_and_no_reference_the_update_is_the_only_pass(tmp_path):
    config = replace(CONFIG, old_logprobs="sampler", kl_coef=0.0, steps=1)
    (row,) = trained(tmp_path / "a", config)
    assert not {"old_logprob_seconds", "reference_logprob_seconds"} & set(row)
    assert row["ratio_mean"] == pytest.approx(1, abs=0.1) and row["sampler_gap_max"] < 2e-5


class Altered(TransformersEngine):
    """Tells something else than it has done."""

    def sample(self, requests, params):
        outputs = super().sample(requests, params)
        return [self.alter(output) if i == 5 else output for i, output in enumerate(outputs)]


def without_sets(output):
    return replace(output, kept=None)


def without_the_token(output):
    sets = [output.kept.of(i) for i in range(len(output.token_ids))]
    sets[3] = sets[3][sets[3] != output.token_ids[3]]
    return replace(output, kept=Kept.of_sets(sets))


def half_of_a_set(output):
    sets = [output.kept.of(i) for i in range(len(output.token_ids))]
    others = sets[2][sets[2] != output.token_ids[2]]
    sets[2] = torch.cat((others[::2], torch.tensor(output.token_ids[2:3], dtype=torch.int32)))
    return replace(output, kept=Kept.of_sets(sets))


def other_experts(output):
    routing = output.routing.clone()
    routing[-1] = (routing[-1] + 1) % 4
    return replace(output, routing=routing)


def other_log_prob(output):
    return replace(output, logp=(output.logp[0] - 0.5, *output.logp[1:]))


GAPS = [
    (without_the_token, TRUNCATED, r"token 3 of .* its kept set of \d+ tokens does not hold it"),
    (half_of_a_set, TRUNCATED, r"token 2 of .* its kept set of \d+ tokens is not the one that it was drawn from"),
    (other_experts, CONFIG, r"the router of model\.layers\.1\.mlp\.gate chooses other experts .* for 100% of"),
    (other_log_prob, CONFIG, r"token 0 of sample 1 of problem \S+ the log-prob -\S+, and the trainer gives it -\S+; "
        r"rollout\.max_gap lets them differ by 0\.001: no router and no kept set differs"),
]  # fmt: skip


# what differs is told alike where the gap shows in the update: one that is infinite, and one that is not
GAPS = [("recomputed", *each) for each in GAPS] + [("sampler", *each) for each in GAPS[::3]]


@pytest.mark.parametrize(
    ("old", "alter", "config", "said"), GAPS, ids=[f"{old}-{alter.__name__}" for old, alter, *_ in GAPS]
)
def test_a_gap_stops_the_run_with_what_differs_before_anything_is_learnt(
    tmp_path, monkeypatch, old, alter, config, said
):
    monkeypatch.setattr(
        grpo.engines, "connect", lambda rollout, model, tokenizer, version=0: Altered(model, tokenizer)
    )
    monkeypatch.setattr(Altered, "alter", staticmethod(alter), raising=False)
    policy = same_model()
    before = cloned(policy.state_dict())
    with pytest.raises(EngineError, match=said) as caught:
        trained(tmp_path / "a", replace(config, old_logprobs=old, minibatches=1), policy)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    rows = trained(
        tmp_path / "b",
        replace(config, old_logprobs=old, minibatches=1, steps=1),
        rollout=replace(load("smoke").rollout, max_gap=math.inf),
    )
    assert rows[0]["sampler_gap_max"] > gap.LIMITS["transformers", "float32"]


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ([], 1e-3),
        (["model.pretrained=smollm2"], 5e-3),
        (["dtype=bfloat16"], 1.0),
        (["dtype=bfloat16", "model.pretrained=smollm2"], 5.0),
        (["rollout.engine=vllm"], 1e-2),
        (["rollout.engine=vllm", "rollout.dtype=bfloat16"], 5.0),
        (["rollout.max_gap=0.03"], 0.03),
    ],
    ids=str,
)
def test_the_limit_is_a_setting_whose_default_is_that_of_the_engine(words, limit):
    recipe = load("smoke", words)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
        assert gap.limit(recipe, "cpu") == pytest.approx(limit)


def test_sets_of_responses_are_joined_in_order():
    parts = [
        Kept.of_sets([torch.tensor([4, 2]), torch.tensor([], dtype=torch.int64)]),
        Kept.of_sets([torch.tensor([7])]),
    ]
    joined = Kept.joined(parts)
    assert (joined.ids.tolist(), joined.offsets.tolist()) == ([4, 2, 7], [0, 2, 2, 3])
    assert isinstance(Output((1,), (0.0,), True, 0, kept=joined).kept, Kept)
