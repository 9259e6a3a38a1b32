"""`--profile`: where the time of a step goes, as torch.profiler sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from training.parallel import ranks
from training.run_dir import PROFILE

ROWS = 40  # operators that are shown

_asked: ContextVar[bool] = ContextVar("profile", default=False)


@contextmanager
def profiling(asked: bool) -> Iterator[None]:
    """Inside the block, stages profile one of their steps where it is `asked` for."""
    before = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(before)


@contextmanager
def profiled(folder: Path, step: int, start: int, steps: int) -> Iterator[None]:
    """Writes the profile of the block to `folder` where it is asked for and `step` is the one to look at: the second of this
    process, which is warm, or the last where there is no second."""
    if not (_asked.get() and ranks.main()) or step != min(start + 1, steps - 1):
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        yield
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=50)
    (folder / PROFILE).write_text(f"step {step}\n{table}", encoding="utf-8")
