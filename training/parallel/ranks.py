"""The ranks of a run: its processes, and what they exchange.

Every rank runs the same code on the same values. Of a step it computes a share: some rows of a batch, some responses, some
rewards. Sums over the ranks, or the results of all of them in order, then let every rank go on with the same values. Rank 0
alone writes files and speaks, but for what another one works on by itself. In a run of one process nothing is exchanged, and
every function returns what it was given.

A function that exchanges something has to be called by every rank, in the same order.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

BUCKET = (
    2**25
)  # gradients in one sum: those of a small model stand in one, a large one needs no second copy of all

# of the time of a small model's pass or decode step, what does not shrink with its tokens: a judgement
FIXED = 0.25

_queues = itertools.count()  # numbers of those of `apart`, the same on all ranks
_alone = False  # this rank does something by itself


def world() -> int:
    """How many ranks there are."""
    together = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if together else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if world() > 1 else 0


def main() -> bool:
    """Whether this is rank 0, which writes files and speaks."""
    return rank() == 0


def own_key() -> tuple[int, ...]:
    """What tells the draws of this rank from those of the others; nothing on rank 0, which draws as one process does."""
    return () if main() else (rank(),)


def once(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it while the others wait; what it returns can be pickled.

    Raises:
        UserError: the one that it raised there, on every rank.
    """
    if world() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if main():
        with _by_itself():
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def by_main(function: Callable[P, T]) -> Callable[P, T]:
    """A function or method that rank 0 alone carries out, see `once`."""

    @wraps(function)
    def carried_out(*args: P.args, **kwargs: P.kwargs) -> T:
        return once(lambda: function(*args, **kwargs))

    return carried_out


@contextmanager
def _by_itself() -> Iterator[None]:
    """Inside the block this rank is the only one."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order; they can be pickled."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def sums(values: Mapping[str, float]) -> dict[str, float]:
    """Named numbers added up over the ranks; a rank that lacks one adds nothing to it."""
    return added(gather(dict(values)))


def added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Named numbers of several mappings added up; one that lacks a name adds nothing to it."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def union(tensors: Mapping[R, Tensor]) -> dict[R, Tensor]:
    """The tensors of all ranks, each of which has others, by name; they are on the device of this rank's."""
    if world() == 1:
        return dict(tensors)
    device = next((each.device for each in tensors.values()), None)
    parts = gather({name: each.cpu().numpy() for name, each in tensors.items()})
    return {name: torch.from_numpy(each).to(device) for part in parts for name, each in part.items()}


def share(weights: Sequence[float]) -> range:
    """Indices of the items that are this rank's: a stretch of them, of about the same weight as that of every other rank."""
    ranks, total = world(), sum(weights)
    if ranks == 1 or not total:
        return range(len(weights)) if main() else range(0)
    # an item belongs where its middle lies; one of no weight may lie at the very end
    owners = [
        min(ranks - 1, int((end - weight / 2) * ranks / total))
        for end, weight in zip(itertools.accumulate(weights), weights, strict=True)
    ]
    own = [index for index, owner in enumerate(owners) if owner == rank()]
    return range(own[0], own[-1] + 1) if own else range(0)


def spread(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """`work` of the items, one result each in order: every rank does a stretch of them."""
    own = share([1.0] * len(items))
    return [each for part in gather(list(work(items[own.start : own.stop]))) for each in part]


def even(weights: Sequence[float]) -> bool:
    """Whether ranks that do whole items of these weights take no longer than if they did all of them together, a part of each."""
    loads = [0.0] * world()
    for weight in sorted(weights, reverse=True):
        heapq.heapreplace(loads, loads[0] + weight)
    return max(loads) <= (FIXED + (1 - FIXED) / world()) * sum(loads)


def apart(work: Callable[[T], R], items: Sequence[T], weights: Sequence[float]) -> list[R]:
    """`work` of each item, in order; its results can be pickled. Several ranks do whole items, each by itself as one process would,
    the next that is left and heaviest: worth it where the weights are `even`.
    """
    order = sorted(range(len(items)), key=lambda index: -weights[index])
    queue, done = f"r1kernels/apart/{next(_queues)}", {}
    with _by_itself():
        while (turn := store().add(queue, 1)) <= len(order):
            done[order[turn - 1]] = work(items[order[turn - 1]])
    found = {index: each for part in gather(done) for index, each in part.items()}
    return [found[index] for index in range(len(items))]


def store() -> Any:
    """Where ranks leave numbers and texts for each other, and do not wait."""
    return dist.distributed_c10d._get_default_store()


def together(work: Callable[[list[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """What `work` makes of the items of all ranks at once, on rank 0: the results of this rank's items."""
    parts = gather(list(items))
    results = once(lambda: list(work([each for part in parts for each in part])))
    first = sum(map(len, parts[: rank()]))
    return results[first : first + len(items)]


def sum_tensor(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks."""
    if world() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter], numbers: Tensor) -> Tensor:
    """Adds the gradients up over the ranks, in place, and returns the sums of `numbers` (N,), float32, which go with the last of
    them. A parameter that has no gradient on any rank still has none."""
    if world() == 1:
        return numbers
    *before, last = _buckets(parameters)
    for bucket in (*before, last):
        gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in bucket]
        there = torch.tensor([each.grad is not None for each in bucket]).to(gradients[0])
        with_them = numbers[: len(numbers) if bucket is last else 0].to(gradients[0])
        flat = torch.cat([*(each.reshape(-1) for each in gradients), there, with_them])
        dist.all_reduce(flat)
        sizes = [*(each.numel() for each in bucket), len(bucket), len(with_them)]
        *summed, there, sums = flat.split(sizes)
        for parameter, gradient, count in zip(bucket, summed, there.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if count else None
    return sums


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in lists of about BUCKET elements."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(each.numel() for each in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
