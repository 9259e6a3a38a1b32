"""Work on several ranks of gloo, forked from the process of the test: what is imported and built there is there at once."""

import contextlib
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

DEADLINE = 120  # seconds until ranks are given up


def on_ranks(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` returns on each rank, in order. folder: for the file by which they meet, new for each call."""
    with ranks_for(count, folder, {"work": work}) as does:
        return does("work", last=True)


@contextlib.contextmanager
def ranks_for(
    count: int, folder: Path, works: dict[str, Callable[..., Any]]
) -> Iterator[Callable[..., list[Any]]]:
    """Ranks that do one work after another, by its name and arguments that can be pickled: what it returns on each, in order.

    last: each rank ends with this work. The others notice it, where they wait for a rank that has failed alone.
    """
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    pipes, children = [], []
    for rank in range(count):
        mine, theirs = context.Pipe()
        child = context.Process(
            target=_rank, args=(rank, count, works, folder / "store", theirs), daemon=True
        )
        child.start()
        theirs.close()
        pipes.append(mine)
        children.append(child)

    def does(name: str, *args: Any, last: bool = False) -> list[Any]:
        for pipe in pipes:
            pipe.send((name, args, last))
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(DEADLINE), f"rank {rank} hangs"
            answers.append(pickle.loads(pipe.recv_bytes()))
        for _, error in answers:
            assert error is None, error
        return [answer for answer, _ in answers]

    try:
        yield does
    finally:
        for child in children:
            child.kill()
            child.join()


def _rank(rank: int, count: int, works: dict[str, Callable[..., Any]], store: Path, pipe: Any) -> None:
    seconds = timedelta(seconds=DEADLINE)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=seconds
    )
    last = False
    while not last:
        name, args, last = pipe.recv()
        try:
            answer, error = works[name](*args), None
        except BaseException:
            answer, error = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps((answer, error)))
