"""An op, declared once: the torch ops of its kernels, its gradient, its reference and its limits.

A ``Kernel`` is one torch op for each backend, ``<name>_<backend><suffix>``. Its argument list is a NamedTuple, of which the schema
is made, and a function of that gives the shapes of the results. cpu and cuda are implemented by name in C++, triton by
``@KERNEL.implement("triton")``; the torch ops exist without any of them. ``recorded`` puts an autograd function around a kernel,
entered only where a gradient is needed. An ``Op`` joins that and a reference, which autograd differentiates, under the name of
the public function.

This file alone knows torch.library and, but for the check that a derivative is a first one, torch.autograd.Function.
docs/architecture.md shows how an op is added.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from . import backends, checks, devices, extension

BACKENDS = ("cpu", "cuda", "triton")
Size = Annotated[int, "size"]
"""Annotates an integer that changes with lengths, which torch.compile keeps symbolic."""
Written = Annotated[Tensor, "written"]
"""Annotates a tensor that a kernel writes to."""

OUTSIDE = "outside"
"""Annotates a field that no kernel sees, ``Annotated[..., OUTSIDE]``: what happens around it. It stands last and has a default."""

Contiguous = Annotated[Tensor, None]
Float32 = Annotated[Tensor, torch.float32]
Int32 = Annotated[Tensor, torch.int32]
"""Annotate a tensor that kernels take contiguous, and in this dtype, whatever a call holds."""

# triton on the CPU: in its interpreter
_KEYS = {"cpu": ("CPU",), "cuda": ("CUDA",), "triton": ("CUDA", "CPU")}
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Written: "Tensor({}!)",
    list[Tensor]: "Tensor[]",
    list[int]: "int[]",
    Size: "SymInt",
    int: "int",
    float: "float",
    bool: "bool",
    bool | None: "bool?",
}
_TAKEN: dict[Any, torch.dtype | None] = {}
for _kind in (Contiguous, Float32, Int32):
    _TYPES |= {_kind: "Tensor", _kind | None: "Tensor?"}
    _TAKEN |= dict.fromkeys((_kind, _kind | None), typing.get_args(_kind)[1])
_library = torch.library.Library("r1kernels", "FRAGMENT")
# torch ops that the extension may implement, or Python, and their dispatch keys
_compiled: list[tuple[str, str]] = []


class Fields:
    """The fields of a NamedTuple in a row; a field that is such a NamedTuple itself stands with its own fields in its place.

    Those outside of kernels are left out, and have their defaults on the way back. A NamedTuple at the end that is its default, which
    is made of the defaults of its fields, is left out too: they stand in the schema, and what is not passed costs nothing.
    """

    def __init__(self, arguments: type[Any]) -> None:
        self._make = arguments._make
        self.types: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}  # of the last of these
        self._outside: tuple[Any, ...] = ()
        # of the NamedTuples among the fields: the place in a call, its default, what it holds, the places in a row
        self._nested: list[tuple[int, Any, Fields, int, int]] = []
        hints, given = typing.get_type_hints(arguments, include_extras=True), arguments._field_defaults
        for place, name in enumerate(arguments._fields):
            if OUTSIDE in getattr(hints[name], "__metadata__", ()):
                self._outside += (given[name],)
                continue
            found = {name: hints[name]}
            defaults = {name: given[name]} if name in given else {}
            if hasattr(hints[name], "_fields"):
                inner, begin = Fields(hints[name]), len(self.types)
                found, defaults = inner.types, inner.defaults
                self._nested.append((place, given.get(name), inner, begin, begin + len(found)))
            if not self.types.keys().isdisjoint(found):
                raise TypeError(f"{arguments.__name__}: expected names that occur once, got {name} again")
            self.types |= found
            self.defaults |= defaults
        self._end = len(arguments._fields) - len(self._outside)
        for place, default, *_ in self._nested:
            if default is not None and place != self._end - 1:
                raise TypeError(
                    f"{arguments.__name__}: expected no field after {arguments._fields[place]}, which has a default"
                )
        self._last = tuple(self.defaults.values())
        self.is_row = not self._nested and not self._outside  # a call is its row

    def schema(self) -> str:
        """The argument list of a torch op."""
        return ", ".join(
            # of tensors that are written to none is another: each has a letter of its own
            f"{_TYPES[of].format(chr(ord('a') + place))} {name}"
            + (f"={self.defaults[name]}" if name in self.defaults else "")
            for place, (name, of) in enumerate(self.types.items())
        )

    def of(self, call: Any) -> tuple[Any, ...]:
        """The fields of ``call`` in a row."""
        row: tuple[Any, ...] = ()
        start = 0
        for place, default, inner, _, _ in self._nested:
            part = call[place]
            if part is default:
                return row + call[start:place]
            row += call[start:place] + (part if inner.is_row else inner.of(part))
            start = place + 1
        return row + call[start : self._end]

    def back(self, row: tuple[Any, ...]) -> Any:
        """The NamedTuple of fields in a row, of which the last may be missing that are their defaults."""
        missing = len(self.types) - len(row)
        if missing:
            row += self._last[-missing:]
        values: tuple[Any, ...] = ()
        start = 0
        for _, _, inner, begin, end in self._nested:
            values += (*row[start:begin], inner.back(row[begin:end]))
            start = end
        return self._make(values + row[start:] + self._outside)


def nothing(call: Any) -> None:
    """The shapes of a kernel that writes to its arguments alone."""


class Kernel:
    """One torch op for each of ``backends``; ``kernel(backend, call)`` runs it.

    Args:
        name: of the op; ``suffix`` follows the name of the backend.
        arguments: a NamedTuple annotated with Tensor, Contiguous, Float32, Int32, one of these | None, Written, list[Tensor],
            Size, int, list[int], float, bool, bool | None, another such NamedTuple, or OUTSIDE.
        shapes: (call) -> the results uninitialised: a tensor, a tuple of tensors or lists of tensors, or None, and annotated as that.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Any],
        shapes: Callable[[Any], Any],
        *,
        backends: Sequence[str] = BACKENDS,
        suffix: str = "",
    ) -> None:
        self.fields = Fields(arguments)
        self._taken = [
            (place, _TAKEN[of]) for place, of in enumerate(self.fields.types.values()) if of in _TAKEN
        ]
        self._names = {backend: f"{name}_{backend}{suffix}" for backend in backends}
        self._ops = {}
        for backend, op in self._names.items():
            _library.define(f"{op}({self.fields.schema()}) -> {_results(shapes)}")
            torch.library.register_fake(f"r1kernels::{op}", self._of_row(shapes), lib=_library)
            self._ops[backend] = getattr(torch.ops.r1kernels, op).default
            if backend != "triton":
                _compiled.append((op, _KEYS[backend][0]))

    def __call__(self, backend: str, call: Any) -> Any:
        row = call if self.fields.is_row else self.fields.of(call)
        for place, dtype in self._taken:
            if place >= len(row):
                break
            value = row[place]
            # asked first: each call that would change nothing costs as much as the kernel of a small batch
            if value is not None and not (
                (dtype is None or value.dtype is dtype) and value.is_contiguous() and not value.requires_grad
            ):
                row = (*row[:place], _taken(value, dtype), *row[place + 1 :])
        return self._ops[backend](*row)

    def implement(self, backend: str, *keys: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorates a function of the call: this backend's op, for tensors of its devices or of these dispatch keys."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            for key in keys or _KEYS[backend]:
                _library.impl(self._names[backend], self._of_row(function), key)
            return function

        return register

    def _of_row(self, function: Callable[[Any], Any]) -> Callable[..., Any]:
        """A function of the call as one of its fields in a row."""
        return lambda *row: function(self.fields.back(row))


def recorded(
    name: str,
    forward: Callable[[str, Any], Any],
    *,
    differentiable: Callable[[Any], tuple[Tensor | None, ...]],
    save: Callable[[Any, Any], tuple[Sequence[Tensor | None], Any]],
    backward: Callable[..., Sequence[Any]],
    give: Callable[[Any, Any], Any] | None = None,
    constant: Sequence[int] = (),
    again: Callable[..., Sequence[Any]] | None = None,
) -> Callable[[str, Any], Any]:
    """(backend, call) -> results, with the gradient that autograd asks for.

    Args:
        name: of the public op, for errors.
        forward: (backend, call) -> the results of the kernel.
        differentiable: (call) -> its inputs that have a gradient, tensors or None; they are saved for the backward.
        save: (call, results) -> (further tensors, anything else) that the backward needs.
        backward: (backend, inputs, tensors, others, gradients of what is given, which inputs need one) -> gradients of the
            inputs, which autograd casts to their dtypes. It runs without autograd.
        again: the same for a further backward through one graph, where the first overwrites what was saved; None: backward.
        give: (call, results) -> what is handed out, None: the results; the places in ``constant`` have no gradient.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, backend: str, call: Any, *inputs: Tensor | None) -> Any:
            results = forward(backend, call)
            tensors, ctx.others = save(call, results)
            ctx.save_for_backward(*inputs, *tensors)
            ctx.backend, ctx.ran = backend, False
            ctx.set_materialize_grads(False)
            given = results if give is None else give(call, results)
            if constant:
                ctx.mark_non_differentiable(*[given[place] for place in constant])
            return given

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needs, saved = ctx.needs_input_grad[2:], ctx.saved_tensors
            inputs, tensors = saved[: len(needs)], saved[len(needs) :]
            if grads[0] is None and all(grad is None for grad in grads):
                return None, None, *[None for _ in needs]
            gradients = again if again is not None and ctx.ran else backward
            ctx.ran = True
            if not torch.is_grad_enabled():
                found = gradients(ctx.backend, inputs, tensors, ctx.others, grads, needs)
            else:  # create_graph=True
                with torch.no_grad():
                    found = gradients(ctx.backend, inputs, tensors, ctx.others, grads, needs)
                given = [x for x in inputs if x is not None]
                found = [x if x is None else checks.first_derivative_only(name, x, *given) for x in found]
            return None, None, *[found[place] if needed else None for place, needed in enumerate(needs)]

    Function.__name__ = Function.__qualname__ = "".join(part.capitalize() for part in name.split("_"))

    def run(backend: str, call: Any) -> Any:
        if torch.is_grad_enabled():
            inputs = differentiable(call)
            for value in inputs:
                if value is not None and value.requires_grad:
                    return Function.apply(backend, call, *inputs)
        results = forward(backend, call)
        return results if give is None else give(call, results)

    return run


class Op:
    """A public op: ``op(backend, call)`` runs it on the backend that serves the call; None chooses (backends.py).

    Without kernels the call may be any arguments.

    Args:
        name: that of the public function.
        reference: (call) -> results by plain PyTorch, which autograd and every transform of PyTorch differentiate.
        kernels: (backend, call) -> the same results; None: plain PyTorch is all there is.
        decides: the field whose device and dtype, one of ``dtypes``, say whether a kernel can serve the call.
        limits: (backend, call) -> sentences that say why else it cannot.
        only: the backends that have kernels of this op.
        cuda_yields: (the field ``decides``) -> why cuda leaves the call to another backend that can serve it; empty: it does not.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        kernels: Callable[[str, Any], Any] | None = None,
        *,
        decides: str = "",
        dtypes: Sequence[torch.dtype] = devices.FLOATS,
        limits: Callable[[str, Any], Sequence[str]] | None = None,
        only: Sequence[str] = BACKENDS,
        cuda_yields: Callable[[Any], str] | None = None,
    ) -> None:
        self.name = name
        backends.register(name, "reference", reference)
        if kernels is None:
            return

        def reasons_of(backend: str) -> Callable[[Any], Sequence[str]]:
            of_device = getattr(devices, backend)

            def reasons(call: Any) -> Sequence[str]:
                found = of_device(decides, getattr(call, decides), dtypes)
                others = () if limits is None else limits(backend, call)
                return (*found, *others) if others else found

            return reasons

        yields = {}
        if cuda_yields is not None:
            yields["cuda"] = lambda call: cuda_yields(getattr(call, decides))
        for backend in only:
            backends.register(
                name, backend, partial(kernels, backend), reasons_of(backend), yields.get(backend)
            )

    def __call__(self, backend: str | None, *call: Any) -> Any:
        return backends.dispatch(self.name, backend, *call)


def declared() -> None:
    """Called once all ops are declared: an extension that does not implement them is refused."""
    extension.expect(_compiled)
    devices.ask_extension()


def _taken(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as kernels take it: in this dtype, contiguous, without gradient."""
    if tensor.requires_grad and torch.is_grad_enabled():
        tensor = tensor.detach()
    if dtype is not None and tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _results(shapes: Callable[..., Any]) -> str:
    """The results of a schema, from the annotation of the function that makes their shapes."""
    given = typing.get_type_hints(shapes)["return"]
    if given is Tensor:
        return "Tensor"
    return f"({', '.join('Tensor' if of is Tensor else 'Tensor[]' for of in typing.get_args(given))})"
