"""GRPO (DeepSeek-R1, arXiv 2501.12948, equations 1 to 3): sample groups, reward them, update the policy.

One step: `prompts` questions, `group_size` responses each, advantages within each group, then one pass over the
responses in `minibatches` optimizer steps at random order. The old and the reference log-probs are computed before the
first update, with the routing of the rollout replayed in all passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from training import checkpoint, engines, rewards, seeding
from training.context import StageContext
from training.encoder import Encoder
from training.engines import Engine, EngineError
from training.loops.batch import Batch, collate, logprobs, pieces, routed, row_of
from training.loops.loss import policy_loss
from training.loops.off_policy import corrections, sampler_gap, staleness
from training.loops.optim import Optimizer, learning_rate, save_due
from training.loops.sample import Completion, Prompt, sample
from training.loops.watch import Watch
from training.model import StepLoad, frozen_copy, shares_prefixes
from training.profile import profiled
from training.prompts import Prompter
from training.recipe import Grpo
from training.response import parse
from training.rewards import Sample, Scored
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
        reward: step, all responses of the step -> their rewards, in order.
        config: sizes, learning rate, loss. Its `rewards` are the caller's business.
        context: where metrics, samples and resume points go; `context.stage` resumes a run that was cut off.
        reference: the policy that the KL term stays near; None: a copy of `policy` as it comes in. Where config.kl_coef is 0
            nothing measures a distance from it, and no copy is held.

    Raises:
        UserError: too many steps in a row without a finite loss or gradient.
        EngineError: the engine failed; a resume point holds all steps before.
    """
    optimizer = Optimizer(policy, weight_decay=config.weight_decay, grad_clip=config.grad_clip)
    reference = (reference or frozen_copy(policy)) if config.kl_coef else None
    state = context.stage.load_state()
    start = 0
    if state is not None:
        start = state.step
        optimizer.restore(state.tensors, state.counters)
        if reference is not None and config.reference_every:
            checkpoint.load_model_tensors(reference, state.tensors, "reference.")
    watch = Watch(context.stage.metrics())
    with (
        closing(engines.connect(context.recipe.rollout, policy, tokenizer, start)) as engine,
        context.progress.grpo_bar(config.steps, start, context.name) as bar,
    ):

        def save(step: int) -> None:
            tensors = optimizer.tensors()
            if reference is not None and config.reference_every:
                tensors |= checkpoint.model_tensors(reference, "reference.")
            context.stage.save_state(step, tensors, optimizer.counters())

        for step in range(start, config.steps):
            try:
                engine.update(policy, step)
                with profiled(context.stage.path, step, start, config.steps):
                    metrics = _step(
                        engine,
                        policy,
                        reference,
                        tokenizer,
                        optimizer,
                        problems,
                        prompt,
                        reward,
                        config,
                        context,
                        step,
                    )
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
                reference.load_state_dict(policy.state_dict())
            if save_due(step + 1, config.steps, config.save_every, context.stage.unsaved_seconds):
                save(step + 1)
    policy.eval()
    return _final(context.stage.metrics(), config.steps)


def _step(
    engine: Engine,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: Optimizer,
    problems: Callable[[int], list[Problem]],
    prompt: Prompter,
    reward: Callable[[int, list[Sample]], list[Scored]],
    config: Grpo,
    context: StageContext,
    step: int,
) -> dict[str, Any]:
    clock = _Clock(policy.device)
    key = (context.recipe.seed, context.name)
    sampled: list[Completion] = []
    scored: list[Scored] = []
    metrics: dict[str, Any] = {}
    keep: list[int] = []  # the responses that carry a loss
    for number in range(config.sampling_rounds if config.keep_groups == "spread" else 1):
        # further rounds ask the questions of steps that never come
        asked = problems(step + number * config.steps)
        drawn = sample(
            engine,
            [Prompt(problem, prompt(problem)) for problem in asked],
            samples=config.group_size,
            temperature=config.temperature,
            max_new_tokens=max_new_tokens(config, step),
            seed_parts=(*key, "rollout", step, *([number] if number else [])),
            batch_size=config.batch_size,
            record_routing=config.replay,
        )
        clock.mark("rollout")
        sampled += drawn
        metrics = staleness(sampled, step, context.recipe.rollout)
        scored += reward(step, [_as_sample(each, context.recipe.response_format) for each in drawn])
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
    pad = Encoder(policy, tokenizer).pad_id
    policy.eval()  # no dropout: the policy that samples and the one that learns are the same function
    models = [policy, *([] if reference is None else [reference])]
    shared = context.recipe.shared_prefix and all(shares_prefixes(each) for each in models)
    work = _Work(policy, reference, optimizer, completions, advantages, pad, config, shared, clock)
    old, ref, measured = _fixed_logprobs(work)
    measured |= sampler_gap(completions, old)
    weights = corrections(completions, old, context.recipe.rollout)
    order = seeding.numpy_rng(*key, "minibatches", step).permutation(len(completions))
    parts: list[dict[str, float]] = []
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
            parts.append(_update(work, rows, old, ref, weights, lr))
    return {
        **metrics,
        **measured,
        "lr": lr,
        **_mean(parts),
        "skipped": optimizer.skipped,
        **clock.seconds,
        "tokens_per_second": tokens / sum(clock.seconds.values()),
        "rollout_tokens_per_second": tokens / clock.seconds["rollout_seconds"],
    }


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


def max_new_tokens(config: Grpo, step: int) -> int:
    """The longest response at `step`: config.max_new_tokens, or the latest entry of max_new_tokens_from."""
    reached = [first for first in config.max_new_tokens_from if first <= step]
    return config.max_new_tokens_from[max(reached)] if reached else config.max_new_tokens


@dataclass(frozen=True)
class _Work:
    """What the log-prob passes and the updates of one step share."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    optimizer: Optimizer
    completions: list[Completion]
    advantages: Tensor  # one per completion
    pad: int
    config: Grpo
    shared: bool  # a prompt is read once for its completions
    clock: _Clock

    def batches(self, rows: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """The completions `rows` in batches of config.micro_batch_tokens, each with the numbers of its completions."""
        read = [row_of(self.completions[i]) for i in rows]
        for piece in pieces(read, self.config.micro_batch_tokens, self.shared):
            ids = [rows[i] for i in piece]
            chosen = [self.completions[i] for i in ids]
            yield ids, collate(chosen, self.pad, self.policy.device, self.config.replay, self.shared)


@torch.no_grad()
def _fixed_logprobs(work: _Work) -> tuple[list[Tensor], list[Tensor] | None, dict[str, float]]:
    """Log-probs of every response under the policy as it is now and under the reference; means over the tokens: the entropy
    and, where the routing of the rollout is replayed, its agreement with that of either model."""
    completions, temperature = work.completions, work.config.temperature
    if not completions:
        return [], None, {}
    old: dict[int, Tensor] = {}
    ref: dict[int, Tensor] = {}
    tokens = sum(len(c.token_ids) for c in completions)
    means: dict[str, float] = {"entropy": 0.0}
    everything = range(len(completions))
    for rows, batch in work.batches(everything):
        found = logprobs(work.policy, batch, temperature, entropy=True)
        means["entropy"] += float(found.entropy.sum()) / tokens
        _add_agreement(means, "replay_agreement_old", batch, found.agreement, tokens)
        old.update(zip(rows, found.logp.split(batch.lengths), strict=True))
        work.clock.mark("old_logprob")
        if work.reference is not None:
            found = logprobs(work.reference, batch, temperature)
            _add_agreement(means, "replay_agreement_reference", batch, found.agreement, tokens)
            ref.update(zip(rows, found.logp.split(batch.lengths), strict=True))
            work.clock.mark("reference_logprob")
    return [old[i] for i in everything], [ref[i] for i in everything] if ref else None, means


def _add_agreement(means: dict[str, float], name: str, batch: Batch, agreement: float, tokens: int) -> None:
    """Adds the share of a replayed batch to a mean over all `tokens`."""
    if batch.routing is not None:
        means[name] = means.get(name, 0.0) + len(batch.targets) / tokens * agreement


def _update(
    work: _Work,
    rows: list[int],
    old: list[Tensor],
    ref: list[Tensor] | None,
    weights: list[Tensor] | None,
    lr: float,
) -> dict[str, float]:
    """One optimizer step on the responses `rows`, in micro-batches whose losses add up to that of the minibatch."""
    totals = {
        "num_sequences": len(rows),
        "num_tokens": sum(len(work.completions[i].token_ids) for i in rows),
        "max_length": max_new_tokens(work.config, 0),
    }
    loss = 0.0
    sums: dict[str, float] = {}
    maxima = 0.0
    load = StepLoad(work.policy)
    for ids, batch in work.batches(rows):
        with routed(work.policy, batch, load) as replay:
            output = policy_loss(
                work.policy,
                batch,
                [old[i] for i in ids],
                None if ref is None else [ref[i] for i in ids],
                None if weights is None else [weights[i] for i in ids],
                work.advantages[ids],
                work.config,
                totals,
            )
            work.clock.mark("new_logprob")
            output.loss.backward()
            agreement = math.nan if replay is None else replay.agreement
        loss += float(output.loss.detach())
        share = len(batch.targets) / totals["num_tokens"]
        measured = output.metrics.floats()
        for name, source in METRICS.items():
            if source in measured:
                sums[name] = sums.get(name, 0.0) + share * measured[source]
        _add_agreement(sums, "replay_agreement", batch, agreement, totals["num_tokens"])
        maxima = max(maxima, measured.get("ratio/max", 0.0))
        work.clock.mark("update")
    norm, taken = work.optimizer.step(loss, lr)
    if taken:
        load.update_bias(work.config.bias_rate)
    work.clock.mark("update")
    return {"loss": loss, **sums, "ratio_max": maxima, "grad_norm": norm, "expert_load": load.max_over_mean()}


# Name in metrics.jsonl -> name in the metrics of r1kernels.grpo_loss, all means over tokens.
METRICS = {
    "kl": "kl",
    "ratio_mean": "ratio/mean",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
}


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
    metrics["format"] = fmean(rewards.format(s.sample).value or 0.0 for s in scored)
    told = [rewards.language_consistency(s.sample).value for s in scored]
    if any(value is not None for value in told):  # no language of the problems has a word list or a script
        metrics["language_consistency"] = fmean(value for value in told if value is not None)
    failed = rewards.errors(scored)
    metrics["reward_errors"] = sum(failed.values())
    if failed:
        metrics["reward_error"] = failed.most_common(1)[0][0]
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


class _Clock:
    """Wall-clock seconds of the parts of a step, under their names in metrics.jsonl; what a part queued on a GPU is its."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """Adds the time since the last mark to `part`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        name = f"{part}_seconds"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
