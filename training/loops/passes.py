"""The passes of a GRPO step over its responses: old and reference log-probs, and the updates of the policy."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training import adapters
from training.loops import gap
from training.loops.batch import Batch, Logprobs, collate, logprobs, no_loss, pieces, routed, row_of
from training.loops.loss import policy_loss
from training.loops.optim import Optimizer
from training.loops.sample import Completion
from training.model import StepLoad
from training.parallel import ranks
from training.parallel.shard import forward
from training.recipe import Grpo
from training.run_dir import StageDir

# Name in metrics.jsonl -> name in the metrics of r1kernels.grpo_loss, all means over tokens.
METRICS = {
    "kl": "kl",
    "ratio_mean": "ratio/mean",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
}


def max_new_tokens(config: Grpo, step: int) -> int:
    """The longest response at `step`: config.max_new_tokens, or the latest entry of max_new_tokens_from."""
    reached = [first for first in config.max_new_tokens_from if first <= step]
    return config.max_new_tokens_from[max(reached)] if reached else config.max_new_tokens


class Clock:
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


class Update(NamedTuple):
    """What an optimizer step tells: of all ranks loss, norm of the gradient and load of the experts; of this rank its parts of the
    means of METRICS, and the largest ratio."""

    loss: float
    grad_norm: float
    expert_load: float
    means: dict[str, float]
    ratio_max: float

    @staticmethod
    def told(parts: Sequence[Update]) -> dict[str, float]:
        """The metrics of a step, from the parts of all ranks."""
        one = parts[0]
        return {
            "loss": one.loss,
            **ranks.added(each.means for each in parts),
            "ratio_max": max(each.ratio_max for each in parts),
            "grad_norm": one.grad_norm,
            "expert_load": one.expert_load,
        }


@dataclass(frozen=True)
class Passes:
    """The passes of one step over its completions, of which every rank computes a share."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None  # the policy itself: it is one without its adapters
    optimizer: Optimizer
    completions: list[Completion]
    advantages: Tensor  # one per completion
    pad: int
    config: Grpo
    shared: bool  # a prompt is read once for its completions
    clock: Clock
    max_gap: float  # largest distance of a log-prob of the sampler from the trainer's
    stage: StageDir

    def batches(self, rows: Sequence[int]) -> Iterator[tuple[list[int], Batch | None]]:
        """This rank's of the completions `rows` in batches of config.micro_batch_tokens, each with the numbers of its completions;
        None for an empty piece of `pieces`."""
        read = [row_of(self.completions[i]) for i in rows]
        for piece in pieces(read, self.config.micro_batch_tokens, self.shared, self.policy):
            if not piece:
                yield [], None
                continue
            ids = [rows[i] for i in piece]
            chosen = [self.completions[i] for i in ids]
            yield ids, collate(chosen, self.pad, self.policy.device, self.config.replay, self.shared)

    @torch.no_grad()
    def fixed_logprobs(
        self,
    ) -> tuple[list[Tensor], list[Tensor] | None, dict[str, float], dict[str, float]]:
        """Log-probs of every response under the policy that drew it and under the reference; `sampler_gap`; and this rank's parts
        of means over the tokens: the entropy and, where the routing of the rollout is replayed, its agreement with that of
        either model.

        With old_logprobs: sampler the policy makes no pass: what is measured in it is left to the first update.

        Raises:
            EngineError: see gap.checked.
        """
        completions, temperature = self.completions, self.config.temperature
        if not completions:
            return [], None, {}, {}
        old: dict[int, Tensor] = {}
        ref: dict[int, Tensor] = {}
        tokens = sum(len(c.token_ids) for c in completions)
        means: dict[str, float] = {}
        everything = range(len(completions))
        recomputed = self.config.old_logprobs == "recomputed"
        for rows, batch in self.batches(everything) if recomputed or self.reference is not None else ():
            if batch is None:
                for model in [self.policy] * recomputed + [self.reference] * (self.reference is not None):
                    no_loss(model)
                continue
            if recomputed:
                found = logprobs(self.policy, batch, temperature, entropy=True)
                means["entropy"] = means.get("entropy", 0.0) + float(found.entropy.sum()) / tokens
                _add_agreement(means, "replay_agreement_old", batch, found.agreement, tokens)
                old.update(zip(rows, found.logp.split(batch.lengths), strict=True))
                self.clock.mark("old_logprob")
            if self.reference is not None:
                with adapters.off(self.policy) if self.reference is self.policy else nullcontext():
                    found = logprobs(self.reference, batch, temperature)
                _add_agreement(means, "replay_agreement_reference", batch, found.agreement, tokens)
                ref.update(zip(rows, found.logp.split(batch.lengths), strict=True))
                self.clock.mark("reference_logprob")
        own = {"old": old, "ref": ref}
        known = ranks.union({(name, i): each for name, part in own.items() for i, each in part.items()})
        old, ref = ({i: each for (of, i), each in known.items() if of == name} for name in own)
        measured: dict[str, float] = {}
        if recomputed:
            measured = gap.checked(self, old)
        else:
            old = {i: torch.tensor(c.logp, device=self.policy.device) for i, c in enumerate(completions)}
        return (
            [old[i] for i in everything],
            [ref[i] for i in everything] if ref else None,
            measured,
            means,
        )

    def update(
        self,
        rows: list[int],
        old: list[Tensor],
        ref: list[Tensor] | None,
        weights: list[Tensor] | None,
        lr: float,
        told: dict[str, float] | None = None,
    ) -> Update:
        """One optimizer step on the responses `rows`, in micro-batches whose losses add up to that of the minibatch.

        told: where given, entropy and `sampler_gap` of the minibatch are put there before the step is taken.

        Raises:
            EngineError: see gap.checked; the policy is what it was.
        """
        totals = {
            "num_sequences": len(rows),
            "num_tokens": sum(len(self.completions[i].token_ids) for i in rows),
            "max_length": max_new_tokens(self.config, 0),
        }
        loss = 0.0
        sums: dict[str, float] = {}
        maxima = 0.0
        load = StepLoad(self.policy)
        seen: list[Logprobs] | None = None if told is None else []
        before: dict[int, Tensor] = {}
        for ids, batch in self.batches(rows):
            if batch is None:
                no_loss(self.policy).backward()
                continue
            compute = partial(
                policy_loss,
                self.policy,
                batch,
                [old[i] for i in ids],
                None if ref is None else [ref[i] for i in ids],
                None if weights is None else [weights[i] for i in ids],
                self.advantages[ids],
                self.config,
                totals,
                seen,
            )
            with routed(self.policy, batch, load) as replay:
                output = forward(self.policy, compute)
                self.clock.mark("new_logprob")
                output.loss.backward()
                agreement = math.nan if replay is None else replay.agreement
            if seen:
                before.update(zip(ids, seen[-1].logp.split(batch.lengths), strict=True))
            loss += float(output.loss.detach())
            share = len(batch.targets) / totals["num_tokens"]
            measured = output.metrics.floats()
            for name, source in METRICS.items():
                if source in measured:
                    sums[name] = sums.get(name, 0.0) + share * measured[source]
            _add_agreement(sums, "replay_agreement", batch, agreement, totals["num_tokens"])
            maxima = max(maxima, measured.get("ratio/max", 0.0))
            self.clock.mark("update")
        if told is not None and seen is not None:
            entropy = sum(float(each.entropy.sum()) for each in seen) / totals["num_tokens"]
            told |= ranks.sums({"entropy": entropy}) | gap.checked(self, ranks.union(before))
        stepped = self.optimizer.step(loss, lr, load, self.stage.unsaved_seconds)
        if stepped.taken:
            load.update_bias(self.config.bias_rate)
        self.clock.mark("update")
        return Update(stepped.loss, stepped.norm, load.max_over_mean(), sums, maxima)


def _add_agreement(means: dict[str, float], name: str, batch: Batch, agreement: float, tokens: int) -> None:
    """Adds the share of a replayed batch to a mean over all `tokens`."""
    if batch.routing is not None:
        means[name] = means.get(name, 0.0) + len(batch.targets) / tokens * agreement
