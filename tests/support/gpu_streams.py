"""On a GPU: what must not wait for it, and what must run on the stream that the caller chose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@contextmanager
def without_waiting() -> Iterator[None]:
    """A block in which whatever waits for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_a_side_stream(source: Tensor, call: Callable[[Tensor], Result]) -> Result:
    """call(x) on a side stream, where x, a copy of ``source``, arrives late: a launch on another stream would read NaN."""
    late = torch.full_like(source, torch.nan).requires_grad_(source.requires_grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late.copy_(source)
        results = call(late)
    stream.synchronize()
    return results
