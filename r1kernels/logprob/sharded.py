"""Log-probs of a vocabulary sharded over a process group, exact: each rank holds some rows of the head.

Every rank sums up its own columns of the logits, gathers the few numbers a token of every other rank and merges them in
rank order (parts.py), so all ranks hold the same bits. Shapes: N tokens, V the columns of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..op import recorded
from . import parts, reference
from .token import Rows, RowsBackwardCall, Upstream


@dataclass(frozen=True)
class Shard:
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
    part: parts.Part, shard: Shard, rows: Rows, with_entropy: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, stats, extra) of the whole vocabulary, as ``parts.finish`` gives them, from this rank's part."""
    numbers = torch.cat((part.chosen.unsqueeze(0), part.stats, part.extra))
    every = [parts.Part(one[0], one[1:4], one[4:]) for one in _gather(numbers, shard.group)]
    merged = parts.merge(every, list(shard.starts), shard.vocabulary, rows)
    return parts.finish(merged, rows, with_entropy, dtype)


def merged_stats(stats: Tensor, shard: Shard, rows: Rows) -> Tensor:
    """M, S', E' (3, N) of the whole vocabulary from those of this rank's columns."""
    nothing = stats.new_empty((0, stats.shape[1]))
    every = [parts.Part(one[0], one, nothing) for one in _gather(stats, shard.group)]
    return parts.merge(every, list(shard.starts), shard.vocabulary, rows).stats.to(stats.dtype)


def sum_over_ranks_(values: Tensor, shard: Shard) -> Tensor:
    """``values``, overwritten with their sum over the ranks, the same bits on all of them."""
    dist.all_reduce(values, group=shard.group)
    return values


def max_over_ranks_(values: Tensor, shard: Shard) -> Tensor:
    """``values``, overwritten with the largest of all ranks."""
    dist.all_reduce(values, dist.ReduceOp.MAX, group=shard.group)
    return values


def copy_to_group(hidden: Tensor, shard: Shard) -> Tensor:
    """``hidden`` itself; its gradient is the sum over the ranks, since each rank's columns give a part of it."""
    return _recorded_copy("reference", CopyCall(hidden, shard))


def all_columns(logits: Tensor, shard: Shard) -> Tensor:
    """The logits (N, V) of all ranks from those of this one, to which its columns of the gradient go."""
    return _recorded_columns("reference", CopyCall(logits, shard))


class CopyCall(NamedTuple):
    hidden: Tensor  # or the logits of this rank
    shard: Shard


def _sum_of_gradients(
    backend: str, inputs: Any, tensors: Any, shard: Shard, grads: Any, needs: Any
) -> list[Tensor]:
    return [sum_over_ranks_(grads[0].clone(memory_format=torch.contiguous_format), shard)]


_recorded_copy = recorded(
    "linear_logprobs",
    lambda backend, call: call.hidden.view_as(call.hidden),
    differentiable=lambda call: (call.hidden,),
    save=lambda call, results: ((), call.shard),
    backward=_sum_of_gradients,
)


def _columns_of_all(backend: str, call: CopyCall) -> Tensor:
    widths = [end - start for start, end in pairwise((*call.shard.starts, call.shard.vocabulary))]
    padded = F.pad(call.hidden, (0, max(widths) - call.hidden.shape[1]))
    every = _gather(padded, call.shard.group)
    return torch.cat([one[:, :width] for one, width in zip(every, widths, strict=True)], dim=1)


def _own_columns(
    backend: str, inputs: Any, tensors: Any, shard: Shard, grads: Any, needs: Any
) -> list[Tensor]:
    return [grads[0][:, shard.first : shard.first + inputs[0].shape[1]]]


_recorded_columns = recorded(
    "linear_logprobs",
    _columns_of_all,
    differentiable=lambda call: (call.hidden,),
    save=lambda call, results: ((), call.shard),
    backward=_own_columns,
)


class ShardedCall(NamedTuple):
    logits: Tensor  # (N, V), this rank's columns, without bias, scale and cap
    rows: Rows
    with_entropy: bool
    extra: Tensor  # (3, N) or (0, N): that of this rank's own distribution
    shard: Shard


def logprobs(
    logits: Tensor, rows: Rows, with_entropy: bool, extra: Tensor, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, extra) of the whole vocabulary by plain PyTorch; log-prob and entropy are differentiable."""
    return _recorded("reference", ShardedCall(logits, rows, with_entropy, extra, shard))


def _forward(backend: str, call: ShardedCall) -> tuple[Tensor, ...]:
    x = reference.scaled(call.logits, call.rows)
    rows = call.rows._replace(temperatures=None, temperature=1.0)  # x is divided already
    chosen = reference.chosen(x, rows.targets, rows.first)
    part = parts.Part(chosen, reference.sums(x, call.with_entropy), call.extra)
    return merge(part, call.shard, rows, call.with_entropy, x.dtype)


def _save(call: ShardedCall, results: tuple[Tensor, ...]) -> Any:
    (_, targets, temperatures), numbers = call.rows.apart()
    logp, _, stats, _ = results
    return (targets, temperatures, logp, stats), (numbers, call.with_entropy)


def _gradients(backend: str, inputs: Any, tensors: Any, others: Any, grads: Any, needs: Any) -> list[Tensor]:
    (logits,), (targets, temperatures, logp, stats), (numbers, with_entropy) = inputs, tensors, others
    rows = Rows.together((None, targets, temperatures), numbers)
    upstream = Upstream(logp, stats, grads[0], grads[1] if with_entropy else None, None)
    return [reference.backward(RowsBackwardCall(logits, rows, upstream))]


_recorded = recorded(
    "linear_logprobs",
    _forward,
    differentiable=lambda call: (call.logits,),
    save=_save,
    backward=_gradients,
    give=lambda call, results: (results[0], results[1], results[3]),
    constant=(2,),
)


def _gather(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """``values`` of every rank, in rank order."""
    every = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, values.contiguous(), group=group)
    return every
