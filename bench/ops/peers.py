"""Who is measured: an implementation of an op, from which package, and why it is missing where it is."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels import backends

from .cases import Case
from .numerics import Exact, error

OURS, EAGER, COMPILED = "r1kernels", "eager PyTorch", "torch.compile"
TRAINING = ("forward", "backward", "forward+backward")
PHASES = ("inference", *TRAINING)


class Unavailable(Exception):
    """An implementation that is not installed here or cannot run this case; the message says why."""


Outputs = Mapping[str, Tensor]


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

    def of(self, names: str) -> Iterator[Tensor]:
        """The tensors of these names, separated by commas, that there are."""
        return (self.tensors[name] for name in names.split(",") if name in self.tensors)

    def require_grad(self) -> Inputs:
        for leaf in self.leaves:
            self.tensors[leaf].requires_grad_()
        return self

    def above(self, outputs: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that have a gradient from above, and those gradients."""
        given = self.upstream if self.upstream_of is None else self.upstream_of(outputs)
        names = [name for name in given if name in outputs]
        return [outputs[name] for name in names], [given[name].reshape(outputs[name].shape) for name in names]

    def gradients(self, outputs: Outputs, above: Any = None) -> dict[str, Tensor]:
        """Those of the leaves, "d hidden" and so on, from those of the outputs."""
        results, gradients = above or self.above(outputs)
        found = torch.autograd.grad(results, [self[leaf] for leaf in self.leaves], gradients)
        return {f"d {leaf}": gradient for leaf, gradient in zip(self.leaves, found, strict=True)}


class Draw:
    """Random tensors, the same in every run."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


Call = Callable[[Inputs], Outputs]
Make = Callable[[Case, Inputs], Any]


@dataclass(frozen=True)
class Peer:
    """One implementation of one op.

    make(case, inputs) gives a function from inputs to named outputs; it or the function raises Unavailable. A "floor" does
    part of the work only (bare GEMMs): its function maps inputs to a function for each phase, and it is no competitor.
    prepare: what has to be set up again before every call, outside of the clock.
    package: the distribution whose version is reported. phases: those that it can be compared in.
    compiles: its first call takes compile time and memory that later ones do not.
    """

    name: str
    make: Make
    kind: str = "peer"  # "ours", "peer" or "floor"
    package: str = "torch"
    prepare: Callable[[Inputs], Inputs] | None = None
    phases: tuple[str, ...] = PHASES
    compiles: bool = False

    def fresh(self, inputs: Inputs) -> Inputs:
        """What it is called with."""
        return inputs if self.prepare is None else self.prepare(inputs)


def _named(names: str, found: Any) -> Outputs:
    """What a function gives, by names that are separated by commas; the rest of it has none."""
    return dict(zip(names.split(","), found if isinstance(found, tuple) else (found,), strict=False))


@dataclass(frozen=True)
class Ours:
    """A public op of r1kernels: names of its arguments, of its results, and its options for a case."""

    op: str
    names: str
    results: str
    options: Callable[[Case, Inputs], dict[str, Any]] = lambda case, inputs: {}

    def peer(self, label: str = "", **more: Any) -> Peer:
        """The op with more options, as an entry of a table of peers."""

        def make(case: Case, inputs: Inputs) -> Call:
            def call(inputs: Inputs) -> Outputs:
                options = {**self.options(case, inputs), **more}
                return _named(self.results, getattr(r1kernels, self.op)(*inputs.of(self.names), **options))

            return call

        return Peer(f"{OURS}, {label}" if label else OURS, make, "ours", OURS)

    def forced(self, device: str) -> tuple[Peer, ...]:
        """On a GPU, where several backends serve an op: each of them by name."""
        several = ("cuda", "triton") if device == "cuda" else ()
        names = (name for name in backends.registered(self.op) if name in several)
        return tuple(self.peer(f"{name} backend", backend=name) for name in names)

    def backend(self, case: Case, inputs: Inputs) -> str:
        """The name of the backend that serves this call."""
        function = getattr(r1kernels, self.op)
        text = r1kernels.explain(function, *inputs.of(self.names), **self.options(case, inputs))
        return next(line.split()[0] for line in text.splitlines() if line.endswith(" runs"))


@dataclass(frozen=True)
class Op:
    """An op that is measured. comparable: brings the results of an implementation into the form of the exact ones."""

    ours: Ours
    inputs: Callable[[Case, torch.device], Inputs]
    exact: Callable[[Case, Inputs], dict[str, Exact]]
    peers: tuple[Peer, ...]
    comparable: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found

    def problem(self, case: Case, device: torch.device) -> tuple[Inputs, dict[str, Exact]]:
        """Inputs that record, and the exact results."""
        inputs = self.inputs(case, device)
        exact = self.exact(case, inputs)
        return inputs.require_grad(), exact

    def errors(self, found: dict[str, Tensor], exact: Mapping[str, Exact]) -> dict[str, float]:
        """Of results and gradients, by name."""
        comparable = self.comparable(found)
        return {name: error(value, exact[name]) for name, value in comparable.items() if name in exact}

    def peers_on(self, device: str, compiles: bool = True, ours: bool = False) -> tuple[Peer, ...]:
        """The implementations, and on a GPU each backend of ours by name too; those that need no compilation, or ours alone."""
        every = (*self.peers, *self.ours.forced(device))
        known = (peer for peer in every if compiles or not peer.compiles)
        return tuple(peer for peer in known if peer.kind == "ours" or not ours)


@dataclass(frozen=True)
class Plain:
    """A function of tensors in plain PyTorch: eager, under torch.compile and, in float64, the exact results."""

    of: Callable[[Case], Callable[..., Any]]
    names: str
    results: str

    def peer(
        self, name: str = EAGER, wrap: Callable[..., Any] = lambda function: function, **more: Any
    ) -> Peer:
        def make(case: Case, inputs: Inputs) -> Call:
            function = wrap(self.of(case))
            return lambda inputs: _named(self.results, function(*inputs.of(self.names)))

        return Peer(name, make, **more)

    def around(self, *ours: Peer) -> tuple[Peer, ...]:
        """Eager, ours, and under torch.compile with static shapes, as its users get the fastest code."""
        compiled = self.peer(COMPILED, partial(torch.compile, dynamic=False), compiles=True)
        return self.peer(), *ours, compiled

    def exact(self, case: Case, inputs: Inputs) -> dict[str, Exact]:
        """Differentiated by autograd."""
        tensors = {name: value.detach() for name, value in inputs.tensors.items()}
        wide = {name: value.double() for name, value in tensors.items() if value.is_floating_point()}
        double = replace(inputs, tensors=tensors | wide).require_grad()
        outputs = self.peer().make(case, double)(double)
        found = {**outputs, **double.gradients(outputs)}
        return {name: Exact(value.detach()) for name, value in found.items()}


def theirs(
    name: str,
    package: str,
    module: str,
    call: Callable[[Any, Inputs, Case], Outputs],
    gpu: bool = False,
    compiles: bool = False,
) -> Peer:
    """Somebody's function: call(its module, inputs, case). gpu: it runs on a GPU only."""

    def make(case: Case, inputs: Inputs) -> Call:
        if gpu and case.device != "cuda":
            raise Unavailable(f"{name} runs on a GPU only")
        found = needs(module, package)
        return lambda inputs: call(found, inputs, case)

    return Peer(name, make, package=package, compiles=compiles)


def needs(module: str, package: str | None = None) -> ModuleType:
    """The imported module of a peer.

    Raises:
        Unavailable: it is not installed, or its import fails; the message holds the error.
    """
    package = package or module.split(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as problem:
        if isinstance(problem, ModuleNotFoundError) and version(package) is None:
            raise Unavailable(f"{package} is not installed") from problem
        raise Unavailable(f"{module} cannot be imported: {type(problem).__name__}: {problem}") from problem


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
