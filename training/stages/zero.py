"""zero: R1-Zero, GRPO from the base model with rule rewards (accuracy and format) and no supervised data before."""

from __future__ import annotations

from typing import Any

from training import responses, rewards
from training.context import StageContext
from training.loops import grpo
from training.loops.passes import max_new_tokens
from training.own_rewards import own_rewards
from training.policy import load_policy, save_policy
from training.prompts import Prompter
from training.rewards import Sample, Scored
from training.tasks.problem import Problem


def run(context: StageContext) -> dict[str, Any]:
    """Train the base model with the R1-Zero template; writes checkpoint."""
    return reinforce(context, responses.prompt_of(context.name, context.recipe))


def reinforce(context: StageContext, prompt: Prompter) -> dict[str, Any]:
    """GRPO on the reasoning problems, from where the recipe says, rewarded by what it lists."""
    config, seed = context.config, context.recipe.seed
    tasks = responses.tasks(context.recipe)
    pool = responses.problems(context.recipe, "train", ("reasoning",))

    def problems(step: int) -> list[Problem]:
        return responses.choose(pool, config.prompts, seed, context.name, "problems", step)

    policy, tokenizer = load_policy(context)
    pool = responses.fitting(policy, tokenizer, pool, prompt)
    with own_rewards(config.rewards, context.recipe.reward_seconds) as own:

        def reward(step: int, samples: list[Sample]) -> list[Scored]:
            limit = max_new_tokens(config, step)
            return rewards.score(samples, config.rewards, tasks, own=own, length_limit=limit)

        metrics = grpo.train(policy, tokenizer, problems, prompt, reward, config, context)
    save_policy(policy, tokenizer, context, responses.style_of(context.name, context.recipe))
    return metrics
