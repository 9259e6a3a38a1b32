"""GRPO (DeepSeek-R1, arXiv 2501.12948, equations 1 to 3): sample groups, reward them, update the policy.

One step: `prompts` questions, `group_size` responses each, advantages within each group, then one pass over the
responses in `minibatches` optimizer steps at random order. The old and the reference log-probs are known before the first
update. In all passes the routing of the rollout is replayed, and a token is scored among those that it was drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from training import adapters, checkpoint, engines, rewards, seeding
from training.context import StageContext
from training.encoder import Encoder
from training.engines import Engine, EngineError
from training.loops import gap
from training.loops.off_policy import corrections, staleness
from training.loops.optim import Optimizer, learning_rate, save_due
from training.loops.passes import Clock, Passes, Update, max_new_tokens
from training.loops.sample import Completion, Prompt, sample
from training.loops.watch import Watch
from training.model import frozen_copy, shares_prefixes
from training.parallel import ranks
from training.parallel.shard import bring_up_to_date, divided, learner_of
from training.profile import profiled
from training.prompts import Prompter
from training.recipe import Grpo
from training.response import parse
from training.rewards import Reward, Sample, Scored
from training.tasks.problem import Problem

# Metrics of a step beside its bar.
SHOWN = ("reward", "accuracy", "format", "language_consistency", "length", "loss")


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Callable[[int], list[Problem]],
    prompt: Prompter,
    reward: Callable[[int, list[Sample]], list[Scored]],
    config: Grpo,
    context: StageContext,
    reference: PreTrainedModel | None = None,
) -> dict[str, float]:
    """Trains `policy` in place for config.steps and returns the mean of the last tenth of the metrics.

    Args:
        problems: step -> the questions of that step, config.prompts of them, a pure function of the step, which may be beyond
            config.steps where further questions are sampled.
        prompt: problem -> the turns before the response.
        reward: step, responses of the step -> their rewards, in order.
        config: sizes, learning rate, loss. Its `rewards` are the caller's business.
        context: where metrics, samples and resume points go; `context.stage` resumes a run that was cut off.
        reference: the policy that the KL term stays near; None: a copy of `policy` as it comes in, or itself without its
            adapters. Where config.kl_coef is 0 nothing measures a distance from it, and no copy is held.

    Raises:
        UserError: too many steps in a row without a finite loss or gradient.
        EngineError: the engine failed; a resume point holds all steps before.
    """
    policy.eval()  # no dropout: the policy that samples and the one that learns are the same function
    if config.kl_coef and reference is None:
        reference = policy if adapters.has(policy) else frozen_copy(policy)
    elif not config.kl_coef:
        reference = None
    models = [policy, *([] if reference is None else [reference])]
    shared = context.recipe.shared_prefix and all(shares_prefixes(each) for each in models)
    learner = learner_of(policy, context.recipe)
    if reference is policy:
        reference = learner
    elif reference is not None:
        reference = divided(reference, context.recipe, offload=True)
    optimizer = Optimizer(
        learner, weight_decay=config.weight_decay, grad_clip=config.grad_clip, kind=config.optimizer
    )
    state = context.stage.load_state()
    start = 0
    if state is not None:
        start = state.step
        optimizer.restore(state)
        if reference is not None and config.reference_every:
            state.read_into(checkpoint.model_tensors(reference, "reference."))
    bring_up_to_date(policy, learner)
    watch = Watch(context.stage.metrics())
    with (
        closing(engines.connect(context.recipe.rollout, policy, tokenizer, start)) as engine,
        context.progress.grpo_bar(config.steps, start, context.name) as bar,
    ):
        run = _Run(
            engine,
            learner,
            reference,
            tokenizer,
            optimizer,
            shared,
            problems,
            prompt,
            reward,
            config,
            context,
        )

        def save(step: int) -> None:
            tensors = optimizer.tensors()
            if reference is not None and config.reference_every:
                tensors |= checkpoint.model_tensors(reference, "reference.")
            context.stage.save_state(step, tensors, optimizer.counters())

        for step in range(start, config.steps):
            try:
                engine.update(policy, step)
                with profiled(context.stage.path, step, start, config.steps):
                    metrics = _step(run, step)
            except EngineError:  # before the step changed anything: a run that goes on draws it again
                if step > start:
                    save(step)
                raise
            context.stage.log(step=step, **metrics)
            watch.see(metrics)
            shown = [name for name in SHOWN if name in metrics]
            if metrics["reward_errors"]:
                shown.append("reward_errors")
            bar.advance(1, **{name: metrics[name] for name in shown})
            if reference is not None and config.reference_every and (step + 1) % config.reference_every == 0:
                reference.load_state_dict(learner.state_dict())
            if save_due(step + 1, config.steps, config.save_every, optimizer.unsaved_seconds):
                save(step + 1)
            bring_up_to_date(policy, learner)
    return _final(context.stage.metrics(), config.steps)


@dataclass(frozen=True)
class _Run:
    """What all steps share."""

    engine: Engine
    policy: PreTrainedModel
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    optimizer: Optimizer
    shared: bool  # what responses have in common goes through a model once
    problems: Callable[[int], list[Problem]]
    prompt: Prompter
    reward: Callable[[int, list[Sample]], list[Scored]]
    config: Grpo
    context: StageContext


def _step(run: _Run, step: int) -> dict[str, Any]:
    policy, config, context = run.policy, run.config, run.context
    clock = Clock(policy.device)
    key = (context.recipe.seed, context.name)
    sampled: list[Completion] = []
    scored: list[Scored] = []
    metrics: dict[str, Any] = {}
    keep: list[int] = []  # the responses that carry a loss
    for number in range(config.sampling_rounds if config.keep_groups == "spread" else 1):
        # further rounds ask the questions of steps that never come
        asked = run.problems(step + number * config.steps)
        drawn = sample(
            run.engine,
            [Prompt(problem, run.prompt(problem)) for problem in asked],
            samples=config.group_size,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=max_new_tokens(config, step),
            seed_parts=(*key, "rollout", step, *([number] if number else [])),
            batch_size=config.batch_size,
            record_routing=config.replay,
            record_kept=True,
        )
        clock.mark("rollout")
        sampled += drawn
        metrics = staleness(sampled, step, context.recipe.rollout)
        scored += _reward(run, step, drawn)
        clock.mark("reward")
        keep = _kept(sampled, scored, config)
        if len(keep) >= config.prompts * config.group_size:
            break
    values = torch.tensor([0.0 if s.total is None else s.total for s in scored])
    valid = torch.tensor([s.total is not None for s in scored])
    advantages = r1kernels.group_advantages(values, group_size=config.group_size, valid=valid)
    _show(context, step, scored, advantages)
    clock.mark("reward")
    metrics |= _reward_metrics(scored, values, valid, config.group_size)
    tokens = sum(len(c.token_ids) for c in sampled)
    metrics |= {
        "length": tokens / len(sampled),
        "finished": fmean(c.finished for c in sampled),
        "kept": len(keep) / len(sampled),
    }
    completions, advantages, valid = [sampled[i] for i in keep], advantages[keep], valid[keep]
    if config.mask_truncated:
        valid &= torch.tensor([c.finished for c in completions], dtype=torch.bool)
    pad = Encoder(policy, run.tokenizer).pad_id
    passes = Passes(
        policy,
        run.reference,
        run.optimizer,
        completions,
        advantages,
        pad,
        config,
        run.shared,
        clock,
        math.inf if metrics["stale"] else gap.limit(context.recipe, policy.device.type),
        context.stage,
    )
    old, ref, measured, means = passes.fixed_logprobs()
    weights = corrections(completions, old, context.recipe.rollout)
    order = seeding.numpy_rng(*key, "minibatches", step).permutation(len(completions))
    updates: list[Update] = []
    lr = learning_rate(
        step,
        config.steps,
        lr=config.lr,
        lr_end=config.lr_end,
        schedule=config.lr_schedule,
        warmup=config.warmup,
    )
    for chosen in torch.from_numpy(order).tensor_split(config.minibatches):
        rows = [int(i) for i in chosen if valid[i]]
        if rows:
            first = not updates and config.old_logprobs == "sampler"
            updates.append(passes.update(rows, old, ref, weights, lr, measured if first else None))
    found = ranks.gather((means, updates))
    told = [Update.told(parts) for parts in zip(*(each for _, each in found), strict=True)]
    return {
        **metrics,
        **ranks.added(each for each, _ in found),
        **measured,
        "lr": lr,
        **_mean(told),
        "skipped": run.optimizer.skipped,
        **clock.seconds,
        "tokens_per_second": tokens / sum(clock.seconds.values()),
        "rollout_tokens_per_second": tokens / clock.seconds["rollout_seconds"],
    }


def _reward(run: _Run, step: int, drawn: Sequence[Completion]) -> list[Scored]:
    samples = [_as_sample(each, run.context.recipe.response_format) for each in drawn]

    def reward(own: Sequence[Sample]) -> list[tuple[float | None, dict[str, tuple[float | None, str]]]]:
        # plain values, which are exchanged at once, without the samples, which every rank has
        return [
            (scored.total, {name: (part.value, part.reason) for name, part in scored.parts.items()})
            for scored in run.reward(step, list(own))
        ]

    return [
        Scored(sample, total, {name: Reward(*part) for name, part in parts.items()})
        for sample, (total, parts) in zip(samples, ranks.spread(reward, samples), strict=True)
    ]


def _as_sample(completion: Completion, response_format: str) -> Sample:
    response = parse(completion.text, response_format)
    return Sample(
        completion.problem,
        completion.text,
        response,
        completion.token_ids,
        completion.sample_id,
        completion.finished,
    )


def _kept(completions: list[Completion], scored: list[Scored], config: Grpo) -> list[int]:
    """The responses of the groups that config.keep_groups keeps; of those with a spread at most config.prompts groups."""
    if config.keep_groups == "all":
        return list(range(len(completions)))
    groups = []
    for first in range(0, len(scored), config.group_size):
        group = range(first, first + config.group_size)
        if len({scored[i].total for i in group} - {None}) > 1:
            groups.append(group)
    return [i for group in groups[: config.prompts] for i in group]


def _reward_metrics(scored: list[Scored], values: Tensor, valid: Tensor, group_size: int) -> dict[str, Any]:
    """Means over the step's responses; a metric of parts that no response has is left out."""
    kept = [s for s in scored if s.total is not None]
    metrics: dict[str, Any] = {"reward": float(values[valid].mean()) if kept else 0.0}
    metrics["reward_spread"] = float(values[valid].max() - values[valid].min()) if kept else 0.0
    terms = sorted({name for s in kept for name in s.parts})
    for name in terms:
        metrics[f"reward/{name}"] = fmean(s.parts[name].value or 0.0 for s in kept if name in s.parts)
    groups = values.view(-1, group_size)
    spread = [
        group[ok].std() for group, ok in zip(groups, valid.view(-1, group_size), strict=True) if ok.sum() > 1
    ]
    metrics["reward_std"] = float(torch.stack(spread).mean()) if spread else 0.0
    metrics["zero_std_groups"] = 1 - sum(bool(s > 0) for s in spread) / len(groups)
    if "accuracy" in terms:
        metrics["accuracy"] = metrics["reward/accuracy"]
        metrics |= _by_level([s for s in kept if "accuracy" in s.parts])
    metrics["format"] = fmean(rewards.format(s.sample).value or 0.0 for s in scored)
    told = [rewards.language_consistency(s.sample).value for s in scored]
    if any(value is not None for value in told):  # no language of the problems has a word list or a script
        metrics["language_consistency"] = fmean(value for value in told if value is not None)
    failed = rewards.errors(scored)
    metrics["reward_errors"] = sum(failed.values())
    if failed:
        metrics["reward_error"] = failed.most_common(1)[0][0]
    return metrics


def _by_level(scored: list[Scored]) -> dict[str, float]:
    """Accuracy and length (tokens) at every level of difficulty, where there are several."""
    levels: dict[str, list[Scored]] = {}
    for each in scored:
        levels.setdefault(each.sample.problem.level, []).append(each)
    if len(levels) < 2:
        return {}
    metrics = {}
    for level, group in sorted(levels.items()):
        metrics[f"accuracy/{level}"] = fmean(s.parts["accuracy"].value or 0.0 for s in group)
        metrics[f"length/{level}"] = fmean(len(s.sample.token_ids) for s in group)
    return metrics


def _show(context: StageContext, step: int, scored: list[Scored], advantages: Tensor) -> None:
    """Writes the best and the worst response of the step to samples.jsonl."""
    totals = [-1e9 if s.total is None else s.total for s in scored]
    best, worst = (
        max(range(len(scored)), key=totals.__getitem__),
        min(range(len(scored)), key=totals.__getitem__),
    )
    rows = []
    for index in sorted({best, worst}):
        one = scored[index]
        rows.append(
            {
                "step": step,
                "problem_id": one.sample.problem.id,
                "language": one.sample.problem.language,
                "kind": one.sample.problem.kind,
                "question": one.sample.problem.question,
                "text": one.sample.text,
                "rewards": {name: part.value for name, part in one.parts.items()},
                "reward": one.total,
                "advantage": float(advantages[index]),
                "finished": one.sample.finished,
            }
        )
    context.stage.add_samples(rows)


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    if not parts:
        return {}
    means = {name: fmean(part[name] for part in parts) for name in parts[0]}
    return {**means, "ratio_max": max(part["ratio_max"] for part in parts)}


def _final(rows: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Means over the last tenth of the steps, without times."""
    last = rows[-max(1, steps // 10) :]
    names = [
        name
        for name, value in (last[-1] if last else {}).items()
        if not name.endswith(("_seconds", "_per_second", "step")) and not isinstance(value, str)
    ]
    return {name: fmean(row[name] for row in last if name in row) for name in names} | {"steps": steps}
