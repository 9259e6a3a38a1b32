"""What one process of several holds, sends and computes: memory, bytes per step and hours of every stage that trains.

R models (`parallel.replicate`) of P weights stand side by side, each divided among S processes (`parallel.shard`). A ring moves
(n - 1) / n of what n processes gather or reduce through each of them, twice that where all of them end with the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.estimate import BYTES, CPU, Device, Estimate, Parameters, length_of, longest_of
from training.parallel import launch
from training.pipeline import plan
from training.recipe import Grpo, NextToken, Recipe

MANY = 1024  # processes that divide a model, at most
HALF = 2  # bytes of a gathered weight in bfloat16
LINKS = {"cpu": 1e9, "cuda": 50e9}  # bytes a second that a process sends: a loopback; 400 Gbit/s per GPU


@dataclass(frozen=True)
class Layout:
    """R models of S processes."""

    replicate: int
    shard: int

    @property
    def processes(self) -> int:
        """All of them."""
        return self.replicate * self.shard


@dataclass(frozen=True)
class Share:
    """One process in a stage: bytes that it holds, sends in a step and in all steps; hours of arithmetic and of exchange."""

    stage: str
    memory_bytes: float
    step_bytes: float
    hours: float
    exchange_hours: float


@dataclass(frozen=True)
class Work:
    """What a process does in a step: optimizer steps, forward and backward passes, forward passes without gradients."""

    updates: int
    passes: int
    readings: int


def layout_of(recipe: Recipe) -> Layout:
    """The layout that a run would have; UserError: the processes make none."""
    count = launch.processes(recipe)
    return Layout(count // recipe.parallel.shard, recipe.parallel.shard)


def sent(weights: int, trained: int, work: Work, layout: Layout, gathered_bytes: int) -> float:
    """Bytes that a process sends in a step.

        whole models    2 (R - 1) / R * 4 B                                             an update: the gradients, summed
        divided ones    (S - 1) / S * P * (2 g + 4)  +  2 (R - 1) / R * 4 B / S         a pass with its backward pass
                        (S - 1) / S * P * g                                             a pass without
                        (S - 1) / S * P * 4                                             the undivided copy, once

    Args:
        weights: P; of these `trained` (B) have gradients.
        gathered_bytes: g, of a weight in a pass.
    """
    ring = 2 * (layout.replicate - 1) / layout.replicate * BYTES * trained
    if layout.shard == 1:
        return work.updates * ring
    part = (layout.shard - 1) / layout.shard * weights
    per_pass = part * (2 * gathered_bytes + BYTES) + ring / layout.shard
    return work.passes * per_pass + work.readings * part * gathered_bytes + part * BYTES


def shares(
    recipe: Recipe, model: Parameters, rows: Sequence[Estimate], layout: Layout, device: Device
) -> list[Share]:
    """One row per stage that trains the recipe's model. rows: of the whole run (training.estimate)."""
    found = []
    gathered = HALF if recipe.dtype == "bfloat16" else BYTES
    link = LINKS["cpu" if device is CPU else "cuda"]
    by_stage = {row.stage: row for row in rows}
    for stage in plan(recipe):
        config = getattr(recipe, stage)
        row = by_stage[stage]
        if not row.training_flops or not isinstance(config, (Grpo, NextToken)):
            continue
        steps, work = _work(config, row, layout)
        step_bytes = sent(model.total, model.trained, work, layout, gathered)
        found.append(
            Share(
                stage,
                held(row, layout.shard),
                step_bytes,
                row.hours(device) / layout.processes,
                steps * step_bytes / link / 3600,
            )
        )
    return found


def held(row: Estimate, shard: int) -> float:
    """Bytes at the peak of a step in one of the `shard` processes that divide a model, which has an undivided copy beside its part."""
    if shard == 1:
        return row.memory_bytes + (row.step_bytes or 0)
    copy = BYTES * row.weights
    return (row.memory_bytes / shard + (row.divided_step_bytes or 0) if row.training_flops else 0) + copy


def fitting(rows: Sequence[Estimate], most: int) -> int | None:
    """The fewest processes, a power of two, that can divide the models so that no stage takes more than `most` bytes in one of
    them; None: not MANY either."""
    shard = 1
    while max(held(row, shard) for row in rows) > most:
        if shard == MANY:
            return None
        shard *= 2
    return shard


def _work(config: Grpo | NextToken, row: Estimate, layout: Layout) -> tuple[float, Work]:
    """Steps of a stage (of GRPO rollouts), and the work of a process in one."""
    if isinstance(config, Grpo):
        texts, updates = config.prompts * config.group_size, config.minibatches
        steps = float(config.steps)
        length = row.trained_tokens / steps / texts
    else:
        texts, updates = config.batch_size, 1
        length = length_of(longest_of(config))
        steps = float(config.steps) or max(1.0, row.trained_tokens / length / texts)
    together = max(1, int(config.micro_batch_tokens / length))  # texts of a pass

    def passes(count: float) -> int:
        return math.ceil(math.ceil(count / layout.processes) / together)

    readings = (1 + bool(config.kl_coef)) * passes(texts) if isinstance(config, Grpo) else 0
    return steps, Work(updates, updates * passes(texts / updates), readings)
