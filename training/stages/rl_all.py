"""rl_all: GRPO over all scenarios, from sft2.

Reasoning problems are rewarded by the rule. Helpful and unsafe ones are rewarded for their format throughout, and in
the last share of the steps by the reward models: the helpful model reads the summary alone, the safety model the
whole response. Language consistency is added for all. Before and after, the policy is scored on unseen prompts by the
oracle, which it was never rewarded by; the reward models' scores stand beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from training import preferences, prompts, responses, reward_model, rewards, seeding
from training.context import StageContext
from training.loops import grpo
from training.loops.passes import max_new_tokens
from training.model import load
from training.own_rewards import own_rewards
from training.policy import load_policy, save_policy
from training.responses import Source, as_sample
from training.rewards import Sample, Scored, Scorer
from training.tasks.problem import Problem

MODELS = {"helpful": "checkpoint-helpful", "harmless": "checkpoint-safety"}
TERM_OF = {"helpful": "helpful", "unsafe": "harmless"}
UNSEEN_SAMPLES = 2  # responses to every unseen prompt, before and after


def run(context: StageContext) -> dict[str, Any]:
    """Train the policy and score it on unseen prompts before and after; writes checkpoint."""
    config, seed, tasks = context.config, context.recipe.seed, responses.tasks(context.recipe)
    start = context.checkpoint(config.start)
    scorers = _scorers(context)
    mix = {kind: share for kind, share in config.mix.items() if share}
    pools = {kind: responses.problems(context.recipe, "train", (kind,)) for kind in mix}

    policy, tokenizer = load_policy(context)
    pools = {kind: responses.fitting(policy, tokenizer, pool, prompts.chat) for kind, pool in pools.items()}
    with own_rewards(config.rewards, context.recipe.reward_seconds) as own:

        def reward(step: int, samples: list[Sample]) -> list[Scored]:
            return rewards.rl_all(
                samples,
                config.rewards,
                tasks,
                scorers,
                own=own,
                step=step,
                steps=config.steps,
                preference_share=config.preference_share,
                length_limit=max_new_tokens(config, step),
            )

        metrics = grpo.train(
            policy,
            tokenizer,
            lambda step: problems_of_step(pools, mix, config.prompts, seed, step),
            prompts.chat,
            reward,
            config,
            context,
        )
    trained = save_policy(policy, tokenizer, context, responses.style_of(context.name, context.recipe))
    name = config.start if config.start in context.inputs else "start"
    unseen = responses.problems(context.recipe, "test", TERM_OF)
    tokens = [float(len(unseen) * UNSEEN_SAMPLES * config.max_new_tokens)] * 2
    before, after = responses.sampled_apart(
        lambda asked: score_unseen(context, responses.load_source(*asked, context.recipe), scorers),
        [(name, start), ("rl_all", trained)],
        tokens,
        [context.recipe.rollout],
    )
    return {
        **metrics,
        **{f"unseen/{name}/before": value for name, value in before.items()},
        **{f"unseen/{name}/after": value for name, value in after.items()},
    }


def _scorers(context: StageContext) -> dict[str, Scorer]:
    """The reward models that there are: none without general problems, and none of a kind that the tasks do not have."""
    if "reward_models" not in context.inputs:
        return {}
    folder = context.inputs["reward_models"].path
    return {
        name: reward_model.scorer(*load(folder / model))
        for name, model in MODELS.items()
        if (folder / model).is_dir()
    }


def problems_of_step(
    pools: Mapping[str, Sequence[Problem]], mix: Mapping[str, float], count: int, seed: int, step: int
) -> list[Problem]:
    """The questions of a step: `count` of them, each kind by its share (largest remainders get what rounding leaves).

    Every kind is drawn without repetition, keyed by seed and step.
    """
    total = sum(mix.values())
    exact = {kind: count * share / total for kind, share in mix.items()}
    counts = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(mix, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: count - sum(counts.values())]:
        counts[kind] += 1
    chosen = []
    for kind, pool in pools.items():
        order = seeding.numpy_rng(seed, "rl_all", "problems", kind, step).permutation(len(pool))
        chosen += [pool[order[i % len(pool)]] for i in range(counts[kind])]
    return chosen


def score_unseen(context: StageContext, source: Source, scorers: Mapping[str, Scorer]) -> dict[str, float]:
    """Oracle and reward models on responses to unseen general prompts, sampled at temperature 1.

    Returns:
        "helpful" and "harmless" (shares by the oracle), "helpful_model" and "harmless_model" (mean scores), each where there
        are such prompts and such a model.
    """
    unseen = responses.problems(context.recipe, "test", TERM_OF)
    drawn = responses.draw(
        source,
        unseen,
        context=context,
        samples=UNSEEN_SAMPLES,
        temperature=1.0,
        max_new_tokens=context.config.max_new_tokens,
        seed_parts=(context.recipe.seed, context.name, "unseen"),
    )
    found = {}
    for kind, term in TERM_OF.items():
        samples = [
            as_sample(completion, source.response_format)
            for completion in drawn
            if completion.problem.kind == kind
        ]
        if not samples:
            continue
        found[term] = fmean(preferences.oracle(sample.problem, sample.response) for sample in samples)
        if term in scorers:
            scored = rewards.score(samples, {term: 1.0}, {}, preferences=scorers)
            found[f"{term}_model"] = fmean(one.total for one in scored if one.total is not None)
    return found
