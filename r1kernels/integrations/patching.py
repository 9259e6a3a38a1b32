"""Functions of another library, checked and replaced, and put back."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """One function of a library and what stands for it."""

    original: Any
    replacement: Any


class Patch:
    """Functions of a library that are replaced; ``undo()``, or leaving it as a context manager, puts them back.

    Args:
        package: the library; in each of its loaded modules a name bound to an original is bound to the replacement, since
            modules import functions from each other by name.
        functions: what to replace there.
        methods: (class, name, replacement) of the methods to replace.
    """

    def __init__(
        self,
        package: str,
        functions: Sequence[Replacement] = (),
        methods: Sequence[tuple[type, str, Callable[..., Any]]] = (),
    ) -> None:
        self._package = package
        self._functions = [*functions]
        self._methods = [(owner, name, owner.__dict__[name], new) for owner, name, new in methods]
        for original, replacement in self._functions:
            _rebind(package, original, replacement)
        for owner, name, _, new in self._methods:
            setattr(owner, name, new)

    def undo(self) -> None:
        """Put everything back, also in modules imported since; a second call does nothing."""
        for original, replacement in self._functions:
            _rebind(self._package, replacement, original)
        for owner, name, original, _ in self._methods:
            setattr(owner, name, original)
        self._functions, self._methods = [], []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def check_signature(
    name: str, installed: Callable[..., Any], expected: Sequence[str], required: int | None = None
) -> None:
    """Check that ``installed`` can be replaced.

    Args:
        name: of the function, for the message.
        expected: the names of its parameters, in order.
        required: how many of them must be there; the others may be missing at the end. None: all.

    Raises:
        ValueError: it is a replacement of r1kernels already. RuntimeError: it has other parameters.
    """
    if installed.__module__.startswith("r1kernels."):
        raise ValueError(f"{name}: expected a library that is not patched yet, got r1kernels in it")
    found = list(inspect.signature(installed).parameters)
    least = len(expected) if required is None else required
    if len(found) < least or found != list(expected[: len(found)]):
        raise RuntimeError(
            f"{name}: expected the parameters ({', '.join(expected)}), the installed version has ({', '.join(found)})"
        )


def check_reads(name: str, installed: Callable[..., Any], expected: set[str]) -> None:
    """Check that a method depends on the ``expected`` attributes of ``self`` and keys of ``inputs``, and on no others.

    Raises:
        RuntimeError: it reads one that is not known, or no longer reads one that is.
    """
    found = _reads(inspect.getsource(installed))
    if found != expected:
        unknown, missing = sorted(found - expected), sorted(expected - found)
        raise RuntimeError(
            f"{name}: the installed version reads {unknown or 'nothing'} new and lacks {missing or 'nothing'}"
        )


def _reads(source: str) -> set[str]:
    """The attributes of ``self`` and ``self.args`` and the keys of ``inputs`` that the source of a method reads."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                found.add(f"self.{name}")
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr="args"), attr=name):
                found.add(f"self.args.{name}")
            case (
                ast.Subscript(value=ast.Name(id="inputs"), slice=ast.Constant(value=key))
                | ast.Call(
                    func=ast.Attribute(value=ast.Name(id="inputs"), attr="get"),
                    args=[ast.Constant(value=key), *_],
                )
            ):
                found.add(f"inputs[{key!s}]")
    return found


def _rebind(package: str, old: Any, new: Any) -> None:
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
