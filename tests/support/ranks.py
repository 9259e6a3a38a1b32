"""Work on several ranks of gloo, forked from the process of the test: what is imported and built there is there at once."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

DEADLINE = 120  # seconds until ranks are given up


def on_ranks(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` returns on each rank, in order. folder: for the file by which they meet, new for each call."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    pipes, children = [], []
    for rank in range(count):
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_rank, args=(rank, count, work, folder / "store", theirs), daemon=True)
        child.start()
        theirs.close()
        pipes.append(mine)
        children.append(child)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(DEADLINE), f"rank {rank} hangs"
            answers.append(pickle.loads(pipe.recv_bytes()))
    finally:
        for child in children:
            child.kill()
            child.join()
    for _, error in answers:
        assert error is None, error
    return [answer for answer, _ in answers]


def _rank(rank: int, count: int, work: Callable[[], Any], store: Path, pipe: Any) -> None:
    seconds = timedelta(seconds=DEADLINE)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=seconds
    )
    try:
        answer, error = work(), None
    except BaseException:
        answer, error = None, traceback.format_exc()
    pipe.send_bytes(pickle.dumps((answer, error)))
    pipe.close()
