"""End to end: one GRPO step of the trainer, with our kernels and with plain PyTorch.

The model is that of the recipe tiny or, where the case names H, I and E, a larger one with random weights. Both sides
sample, score and learn the same: weights, problems and random draws depend on seeds alone. B completions of at most L
tokens, H hidden, I intermediate size of an expert, E experts.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import r1kernels
from training import prompts, rewards
from training.context import StageContext
from training.engines.transformers import TransformersEngine
from training.loops import batch as batches
from training.loops import grpo
from training.loops.sample import Prompt, sample
from training.model import build_model, frozen_copy
from training.progress import Progress
from training.recipe import Recipe, load
from training.rewards import Sample, Scored
from training.run_dir import StageDir
from training.tasks.arithmetic import make_problem
from training.tokenizer import build_tokenizer

from . import memory
from .measure import judge
from .ops.cases import Case
from .ops.numerics import Exact, error
from .ops.peers import OURS
from .results import Row, paired, settle

PARTS = ("rollout", "reward", "old_logprob", "reference_logprob", "new_logprob", "update")
PLAIN = "plain PyTorch"
GROUP = 8
BACKENDS = {PLAIN: "reference", OURS: "auto"}
_MOST_ROUNDS = 20
_SIZES = {"H": "hidden_size", "I": "moe_intermediate_size", "E": "experts"}


def measure(case: Case, seconds: float) -> list[Row]:
    """Rows of both sides; their phases are the parts of the step, and "step" is the whole of it. seconds: as in ``measure``.

    Errors are those of the log-probs that the policy gives its own samples, against the same model in float64.
    """
    bench = Bench(case)
    rows = [Row(PLAIN), Row(OURS, "ours", OURS)]
    exact = bench.logprobs(double=True)
    for row in rows:
        row.backend = BACKENDS[row.peer]
        with r1kernels.use_backend(row.backend):
            row.errors = {"logp": error(bench.logprobs(double=False), Exact(exact))}
        with memory.Peak(bench.device) as peak:
            first = bench.step(row.backend)
        row.peak_bytes = peak.bytes
    judge(rows, case)
    rounds = max(3, min(_MOST_ROUNDS, int(seconds / (2 * first["step"])))) if seconds else 1
    timed = paired({row.peer: partial(bench.step, row.backend) for row in rows if row.status == "ok"}, rounds)
    for row in rows:
        row.rounds = timed.get(row.peer, {})
    settle(rows)
    print(f"  {rounds} rounds, r1kernels {rows[1].median('step') or float('nan'):.2f} s a step", flush=True)
    return rows


@contextmanager
def stage(recipe: Recipe, config: Any) -> Iterator[StageContext]:
    """A stage "zero" in a folder of its own, which says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        made = StageDir(Path(folder) / "zero")
        made.begin({}, {})
        yield StageContext("zero", recipe, config, made, {}, Progress(quiet=True))


class Bench:
    """The policy, its tokenizer and problems, and one step on a copy of them."""

    def __init__(self, case: Case) -> None:
        recipe = load("tiny")
        groups, longest = case.sizes["B"] // GROUP, case.sizes["L"]
        config = replace(recipe.zero, steps=1, save_every=0, prompts=groups, max_new_tokens=longest)
        config.group_size = GROUP
        if "H" in case.sizes:
            sizes: dict[str, Any] = {name: case.sizes[short] for short, name in _SIZES.items()}
            recipe = replace(recipe, model=replace(recipe.model, **sizes))
        self.recipe, self.config, self.device = recipe, config, torch.device(case.device)
        self.tokenizer = build_tokenizer()
        self.policy = build_model(recipe.model, self.tokenizer, seed=0).to(self.device)
        self.problems = [make_problem(10 + i, 9, 60 + i, "en") for i in range(config.prompts)]

    def step(self, backend: str) -> dict[str, float]:
        """Seconds of each part of one step."""
        policy = frozen_copy(self.policy).requires_grad_(True)
        with r1kernels.use_backend(backend), stage(self.recipe, self.config) as context:
            asked = (lambda step: self.problems, prompts.chat, _length_reward)
            grpo.train(policy, self.tokenizer, *asked, self.config, context, reference=self.policy)
            (metrics,) = context.stage.metrics()
        seconds = {part: float(metrics[f"{part}_seconds"]) for part in PARTS}
        return {**seconds, "step": sum(seconds.values())}

    def logprobs(self, double: bool) -> torch.Tensor:
        """What the policy, or its copy in float64, gives to a few of its own responses."""
        chosen = self.problems[:2]
        texts = [Prompt(problem, prompts.chat(problem)) for problem in chosen]
        engine, longest = TransformersEngine(self.policy, self.tokenizer), self.config.max_new_tokens
        completions = sample(
            engine, texts, samples=GROUP, max_new_tokens=longest, seed_parts=(0, "bench"), record_routing=True
        )
        pad = self.tokenizer.pad_token_id
        batch = batches.collate(completions, pad, self.device, replay=True)
        policy = frozen_copy(self.policy)
        with torch.no_grad():
            return batches.logprobs(policy.double() if double else policy, batch, 1.0).logp


def _length_reward(step: int, samples: list[Sample]) -> list[Scored]:
    """The share of different tokens: cheap, and not the same for all."""
    scored = []
    for one in samples:
        value = len(set(one.token_ids)) / max(len(one.token_ids), 1)
        scored.append(Scored(one, value, {"format": rewards.Reward(value, "share of different tokens")}))
    return scored
