"""Log-probs of a vocabulary sharded over a process group, exact: each rank holds some rows of the head.

Every rank sums up its own columns of the logits, gathers the few numbers a token of every other rank and merges them in
rank order (parts.py), so all ranks hold the same bits. Shapes: N tokens, V the columns of this rank.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from . import parts, reference
from .ops import Rows


class Shard(NamedTuple):
    """This rank's columns of the vocabulary."""

    group: dist.ProcessGroup
    first: int
    starts: tuple[int, ...]  # the first column of every rank
    vocabulary: int  # columns of all ranks


def shard_of(weight: Tensor, group: dist.ProcessGroup) -> Shard:
    """The shard that ``weight`` (V, H) is; every rank of the group calls this at once, and waits for the others."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
    sizes = torch.stack(_gather(torch.tensor([weight.shape[0]], device=weight.device), group))
    *starts, vocabulary = accumulate(sizes.flatten().tolist(), initial=0)
    return Shard(group, starts[dist.get_rank(group)], tuple(starts), vocabulary)


def merge(
    part: parts.Part, shard: Shard, rows: Rows, entropy: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, stats, extra) of the whole vocabulary, as ``parts.finish`` gives them, from this rank's part."""
    numbers = torch.cat((part.chosen.unsqueeze(0), part.stats, part.extra))
    every = [parts.Part(one[0], one[1:4], one[4:]) for one in _gather(numbers, shard.group)]
    merged = parts.merge(every, list(shard.starts), shard.vocabulary, rows)
    return parts.finish(merged, rows, entropy, dtype)


def sum_over_ranks_(values: Tensor, shard: Shard) -> Tensor:
    """``values``, overwritten with their sum over the ranks, the same bits on all of them."""
    dist.all_reduce(values, group=shard.group)
    return values


def copy_to_group(hidden: Tensor, shard: Shard) -> Tensor:
    """``hidden`` itself; its gradient is the sum over the ranks, since each rank's columns give a part of it."""
    return _CopyToGroup.apply(hidden, shard)


def run(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    extra: Tensor,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, extra) by plain PyTorch from this rank's logits (N, V) and the global targets (N,).

    extra (3, N) or (0, N): those of this rank's own distribution. Log-prob and entropy are differentiable.
    """
    return _ShardedLogprobs.apply(
        logits, targets, temperatures, temperature, ignore_index, entropy, extra, shard
    )


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks_(grads[0].clone(memory_format=torch.contiguous_format), ctx.shard), None


class _ShardedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        ignore_index: int,
        entropy: bool,
        extra: Tensor,
        shard: Shard,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = reference.scaled(logits, temperatures, temperature)
        # divided by the temperature already
        rows = Rows(None, 1.0, 0.0, targets, None, 1.0, ignore_index, shard.first, shard.vocabulary)
        part = parts.Part(reference.chosen(x, targets, shard.first), reference.sums(x, entropy), extra)
        logp, value, stats, extra = merge(part, shard, rows, entropy, x.dtype)
        ctx.save_for_backward(logits, targets, temperatures, logp, stats)
        ctx.temperature, ctx.ignore_index, ctx.entropy, ctx.shard = temperature, ignore_index, entropy, shard
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(extra)
        return logp, value, extra

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unused = (None,) * 7
        grad_logp = grads[0]
        grad_entropy = grads[1] if ctx.entropy else None
        if grad_logp is None and grad_entropy is None:
            return None, *unused
        logits, targets, temperatures, logp, stats = ctx.saved_tensors
        with torch.no_grad():
            grad = reference.backward(
                logits,
                targets,
                temperatures,
                ctx.temperature,
                ctx.ignore_index,
                logp,
                stats,
                grad_logp,
                grad_entropy,
                ctx.shard.first,
                ctx.shard.vocabulary,
            )
        return checks.first_derivative_only("linear_logprobs", grad, logits), *unused


def _gather(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """``values`` of every rank, in rank order."""
    every = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, values.contiguous(), group=group)
    return every
