"""Ops on a backend that would refuse such tensors: kernels of GPUs under an emulator or an interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from r1kernels import backends
from r1kernels.op import Op


def run_on(backend: str, op: Op, *call: Any) -> Any:
    """``op(backend, *call)`` without a look at what the backend says."""
    return backends._named(op.name, backend).run(*call)


def public_on(backend: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the public ``function`` gives to a backend, run on this one without a look at what it says."""
    call = backends._call_of(function, args, kwargs)
    return backends._named(function.__name__, backend).run(*call)
