"""How the ranks of a run start, meet and end: torchrun starts them, torch.distributed joins them.

A rank that fails says why and ends; torchrun then ends the others, which say nothing. One that is killed is named by whoever
started them. A rank that neither answers nor ends is given up after `parallel.timeout` seconds.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from training.errors import UserError
from training.parallel import ranks
from training.placement import device_of
from training.sections import Recipe

MOST = 8  # processes where the recipe leaves their number open: the steps of a small model bear no more
OTHER = 3  # exit code of a rank that ends because another one did
PATIENCE = 3.0  # seconds in which torchrun ends the other ranks
_TOLD = "r1kernels/told"  # how many ranks have something to say
_SET_PDEATHSIG = 1  # prctl


def started() -> bool:
    """Whether torchrun, or whatever sets its variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def first() -> bool:
    """Whether this is the process that is, or will be, rank 0."""
    return os.environ.get("RANK", "0") == "0" or not started()


def processes(recipe: Recipe) -> int:
    """Of how many processes a run of the recipe is: what torchrun says in one of them, elsewhere what the recipe asks for.

    Raises:
        UserError: they are not `parallel.replicate` times `parallel.shard`.
    """
    layout = recipe.parallel
    if started():
        count = int(os.environ["WORLD_SIZE"])
    elif layout.processes:
        count = layout.processes
    else:
        cuda = device_of(recipe).type == "cuda"
        there = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0)) // recipe.threads
        most = there if cuda else min(MOST, there)
        count = max(1, most // layout.shard) * layout.shard
    if count % layout.shard or layout.replicate not in (0, count // layout.shard):
        models = layout.replicate or "any number"
        raise UserError(
            f"parallel.processes: expected parallel.replicate x parallel.shard = {models} x {layout.shard}, got {count}"
        )
    return count


def launch(words: Sequence[str], count: int, threads: int) -> None:
    """Carries out `python -m training WORDS` in `count` processes of this machine.

    Raises:
        SystemExit: with their exit code, where it is not 0.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault(
        "OMP_NUM_THREADS", str(threads)
    )  # of every process; torchrun warns where it is not said
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # the ranks speak for themselves
            logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = torchrun.parse_args(["--standalone", "--nproc-per-node", str(count), "-m", "training"])
    arguments.training_script_args = list(words)  # which torchrun's parser would take some of for its own
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        raise SystemExit(_told({rank: each.exitcode for rank, each in error.failures.items()})) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval.value) from None


def _told(codes: dict[int, int]) -> int:
    """The exit code of a run whose ranks ended with `codes`; says what no rank could say itself."""
    spoken = [code for code in codes.values() if code > 0 and code != OTHER]
    if spoken:
        return spoken[0]
    killed = {number: signal.Signals(-code) for number, code in codes.items() if code < 0}
    # torchrun ends the others by SIGTERM
    first = {number: each for number, each in killed.items() if each != signal.SIGTERM} or killed
    for number, each in first.items():
        print(
            f"error: rank {number} was ended by {each.name}; the same command goes on from the last resume point",
            file=sys.stderr,
        )
    return 1


@contextmanager
def joined(recipe: Recipe) -> Iterator[None]:
    """Inside the block the processes that torchrun has started are the ranks of one run; without torchrun there is one.

    Raises:
        UserError: another rank did not answer in time.
        SystemExit: another rank ended.
    """
    if not started():
        yield
        return
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM)  # ends with torchrun, however that ends
    backend = "gloo"
    if device_of(recipe).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    seconds = recipe.parallel.timeout
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if "timed out" in text or "timeout" in text:
            raise UserError(
                f"rank {ranks.rank()} waited {seconds:g} s for another one (parallel.timeout): it hangs, or has more to do "
                "than that"
            ) from None
        if "connection" in text or "peer" in text:
            time.sleep(PATIENCE)  # the rank that ended is the one whose exit code counts
            raise SystemExit(OTHER) from None
        raise
    dist.destroy_process_group()


def speaks() -> bool:
    """Whether this process tells what went wrong: of several ranks the first to fail does."""
    if not started():
        return True
    if dist.is_initialized():
        try:
            return int(ranks.store().add(_TOLD, 1)) == 1
        except RuntimeError:
            return False  # who holds the store is gone, and has told why
    if not first():
        time.sleep(PATIENCE)  # what keeps ranks from joining is mostly the same for all
    return True
