"""Who is measured: an implementation of an op, from which package, and why it is missing where it is."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels import backends

from .cases import Case

OURS = "r1kernels"
EAGER = "eager PyTorch"
COMPILED = "torch.compile"
TRAINING = ("forward", "backward", "forward+backward")
PHASES = ("inference", *TRAINING)


class Unavailable(Exception):
    """An implementation that is not installed here or cannot run this case; the message says why."""


@dataclass
class Inputs:
    """The tensors of a case.

    tensors: by name. leaves: names of those that get a gradient. upstream: name of an output -> its gradient;
    upstream_of(outputs) gives it where it depends on what was chosen.
    """

    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]
    upstream: dict[str, Tensor]
    upstream_of: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


Outputs = Mapping[str, Tensor]
Call = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Peer:
    """One implementation of one op.

    make(case, inputs) gives a function from inputs to named outputs, or raises Unavailable. A "floor" does part of the
    work only (bare GEMMs): its function maps inputs to a function for each phase, and it is no competitor.
    prepare: what has to be set up again before every call, outside of the clock.
    package: the distribution whose version is reported. phases: those that it can be compared in.
    compiles: its first call takes compile time and memory that later ones do not.
    """

    name: str
    make: Callable[[Case, Inputs], Any]
    kind: str = "peer"  # "ours", "peer" or "floor"
    package: str = "torch"
    prepare: Callable[[Inputs], Inputs] | None = None
    phases: tuple[str, ...] = PHASES
    compiles: bool = False


@dataclass(frozen=True)
class Ours:
    """A public op of r1kernels as an implementation.

    arguments(case, inputs) gives args and kwargs of the op; outputs(result) its named results.
    """

    op: str
    arguments: Callable[[Case, Inputs], tuple[tuple[Any, ...], dict[str, Any]]]
    outputs: Callable[[Any], Outputs]

    def peer(
        self, label: str = OURS, prepare: Any = None, phases: tuple[str, ...] = PHASES, **options: Any
    ) -> Peer:
        """The op with these options, as an entry of a table of peers."""

        def make(case: Case, inputs: Inputs) -> Call:
            def call(inputs: Inputs) -> Outputs:
                args, kwargs = self.arguments(case, inputs)
                return self.outputs(getattr(r1kernels, self.op)(*args, **kwargs, **options))

            return call

        return Peer(label, make, "ours", "r1kernels", prepare, phases)

    def forced(self, device: str) -> tuple[Peer, ...]:
        """On a GPU, where several backends serve an op: each of them by name."""
        if device != "cuda":
            return ()
        names = [name for name in backends.registered(self.op) if name in ("cuda", "triton")]
        return tuple(self.peer(f"{OURS}, {name} backend", backend=name) for name in names)

    def backend(self, case: Case, inputs: Inputs) -> str:
        """The name of the backend that serves this call."""
        args, kwargs = self.arguments(case, inputs)
        for line in r1kernels.explain(getattr(r1kernels, self.op), *args, **kwargs).splitlines():
            if line.endswith(" runs"):
                return line.split()[0]
        raise RuntimeError(f"{self.op}: explain names no backend that runs")


def needs(module: str, package: str | None = None) -> ModuleType:
    """The imported module of a peer.

    Raises:
        Unavailable: it is not installed, or its import fails; the message holds the error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as problem:
        name = package or module.split(".")[0]
        if problem.name and problem.name.split(".")[0] == module.split(".")[0] and version(name) is None:
            raise Unavailable(f"{name} is not installed") from problem
        raise Unavailable(f"{module} cannot be imported: {problem}") from problem
    except Exception as problem:
        raise Unavailable(f"{module} cannot be imported: {type(problem).__name__}: {problem}") from problem


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def only_on_cuda(case: Case, what: str) -> None:
    """Raise Unavailable unless the case runs on a GPU."""
    if case.device != "cuda":
        raise Unavailable(f"{what} runs on a GPU only")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile, with static shapes, as its users get the fastest code."""
    return torch.compile(function, dynamic=False)
