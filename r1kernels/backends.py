"""Which backend serves a call, and why another does not.

Every public op is served by one of four backends: ``cuda`` (C++ for NVIDIA GPUs), ``triton``, ``cpu`` (C++ with
vector instructions) and ``reference`` (plain PyTorch). The first three may refuse a call and say why; the reference
serves every call and is the oracle of the tests.

Who decides, most specific first:

1. ``backend="triton"`` on the call: that backend or an error with its reasons, never another one;
2. ``with use_backend("reference", op="grpo_loss"):``
3. ``set_backend("reference")``
4. the environment: ``R1KERNELS_BACKEND=reference`` or ``R1KERNELS_BACKEND=token_logprobs:triton,*:auto``, read at import
5. automatic: the first of cuda, triton, cpu, reference that does not refuse; one that yields on the call, since another is
   faster there, is asked last of the kernels.

A backend asked for by 2, 3 or 4 that refuses a call is replaced by the automatic choice, with one log line a reason;
``R1KERNELS_STRICT=1`` or ``set_strict(True)`` makes that, and an automatic choice of the reference where a kernel for
the device of the tensors exists, an error.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import checks, devices, transforms

NAMES = ("cuda", "triton", "cpu", "reference")
AUTO = "auto"
EVERY_OP = "*"

_log = logging.getLogger("r1kernels")


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    ``run(*call)`` computes; ``reasons(*call)``, called with the same arguments, returns sentences that say why this call can
    not be served (none: it can). ``yields(*call)`` says why another backend serves it faster (empty: none does).
    """

    op: str
    name: str
    run: Callable[..., Any]
    reasons: Callable[..., Sequence[str]] | None = None
    yields: Callable[..., str] | None = None

    def refuses(self, *call: Any) -> Sequence[str]:
        if self.reasons is None:
            return ()
        watched, own = transforms.reasons(call), self.reasons(*call)
        return (*watched, *own) if watched else own


class BackendError(RuntimeError):
    """A backend that was asked for cannot serve the call; the message holds its reasons."""


class _Scopes(threading.local):
    """The ``use_backend`` blocks that this thread is in (a thread-local: torch.compile guards it, a ContextVar it can't)."""

    entered: tuple[tuple[str, str], ...] = ()
    explaining: bool = False


class _Call(Exception):
    """What a public function would have given to the backends; raised instead of running one."""


_registry: dict[str, dict[str, Backend]] = {}
_served: dict[tuple[str, str], tuple[Backend, ...]] = {}
_preferred: dict[str, str] = {}
_scoped = _Scopes()
_logged: set[tuple[str, str, str]] = set()
_strict = False


def register(
    op: str,
    name: str,
    run: Callable[..., Any],
    reasons: Callable[..., Sequence[str]] | None = None,
    yields: Callable[..., str] | None = None,
) -> None:
    """Make ``run`` the backend ``name`` of ``op``; ``reasons`` and ``yields`` (same arguments): see ``Backend``."""
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "reference" and reasons is not None:
        raise ValueError("reasons: the reference serves every call and takes none")
    backends = _registry.setdefault(op, {})
    backends[name] = Backend(op, name, run, reasons, yields)
    _registry[op] = {known: backends[known] for known in NAMES if known in backends}
    _served.clear()


def ops() -> tuple[str, ...]:
    """The names of all registered ops, in alphabetical order."""
    return tuple(sorted(_registry))


def registered(op: str) -> tuple[str, ...]:
    """The names of the backends that ``op`` has, in the order of the automatic choice."""
    return tuple(_backends_of(op))


def dispatch(op: str, backend: str | None, /, *call: Any) -> Any:
    """Run ``op`` on the backend that serves this call; ``backend`` is what the caller of the public op gave."""
    if _scoped.explaining:
        raise _Call(*call)
    return choose(op, backend, *call).run(*call)


def choose(op: str, backend: str | None, /, *call: Any) -> Backend:
    """The backend that serves this call (see the order at the top of this file).

    Raises:
        ValueError: ``backend`` is not the name of a backend of this op.
        BackendError: ``backend`` refuses the call, or strict mode is on and the call fell back.
    """
    if backend is not None and backend != AUTO:
        chosen = _named(op, backend)
        refusal = chosen.refuses(*call)
        if refusal:
            raise BackendError(_refusal_text(chosen, refusal))
        return chosen
    wanted = _preference(op)
    if wanted != AUTO and wanted in _backends_of(op):
        chosen = _backends_of(op)[wanted]
        refusal = chosen.refuses(*call)
        if not refusal:
            return chosen
        _fall_back(chosen, refusal)
    device = _device_type(call)
    candidates = _candidates(op, device)
    if candidates and candidates[0].yields is not None:
        candidates = _in_turn(candidates, call)
    for chosen in candidates:
        refusal = chosen.refuses(*call)
        if not refusal:
            return chosen
        if devices.SERVED[chosen.name][0] == device:
            _fall_back(chosen, refusal)
    raise BackendError(f"{op}: no backend can serve this call and no reference is registered")


@contextmanager
def use_backend(name: str, op: str | None = None) -> Iterator[None]:
    """Prefer backend ``name`` (or "auto") for ``op``, or for every op, inside the ``with`` block (this thread)."""
    _check_preference(name, op)
    outer = _scoped.entered
    _scoped.entered = (*outer, (op or EVERY_OP, name))
    try:
        yield
    finally:
        _scoped.entered = outer


def set_backend(name: str, op: str | None = None) -> None:
    """Prefer backend ``name`` (or "auto") for ``op``, or for every op, from now on in this process."""
    _check_preference(name, op)
    if op is None:
        _preferred.clear()
    _preferred[op or EVERY_OP] = name


def set_strict(strict: bool) -> None:
    """Make a fallback an error (True) or a log line (False, the default)."""
    global _strict
    _strict = checks.boolean("strict", strict)


def strict() -> bool:
    """Whether a fallback is an error."""
    return _strict


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """A table of the backends of a public op for one call: which one runs and why the others do not.

    Args:
        op: the public function (``r1kernels.token_logprobs``) or its name.
        args, kwargs: the arguments of the call; nothing is computed. Without any, only the names and the preference are
            known.

    Raises:
        ValueError: ``op`` is unknown. Besides: the errors of the op for these arguments.
    """
    function = op if callable(op) else None
    name = op if isinstance(op, str) else str(getattr(op, "__name__", op))
    backends = _backends_of(name)
    lines = [f"{name} (preference: {_preference(name)})"]
    if not args and not kwargs:
        return "\n".join([*lines, *(f"  {backend}" for backend in backends)])
    if function is None:
        function = getattr(sys.modules["r1kernels"], name)
    call = _call_of(function, args, kwargs)
    chosen = choose(name, kwargs.get("backend"), *call).name
    for backend in backends.values():
        refusal = backend.refuses(*call)
        yielded = backend.yields(*call) if backend.yields is not None and not refusal else ""
        state = "cannot run: " + "; ".join(refusal) if refusal else "could run"
        state += f", and leaves it to others: {yielded}" if yielded else ""
        lines.append(f"  {backend.name:<10} {'runs' if backend.name == chosen else state}")
    return "\n".join(lines)


def _call_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    _scoped.explaining = True
    try:
        function(*args, **kwargs)
    except _Call as raised:
        return raised.args
    finally:
        _scoped.explaining = False
    raise ValueError(f"op: {function.__name__} chose no backend for these arguments")


def _backends_of(op: str) -> dict[str, Backend]:
    if op not in _registry:
        raise ValueError(f"op: expected one of {', '.join(ops())}, got {op!r}")
    return _registry[op]


def _candidates(op: str, device: str) -> tuple[Backend, ...]:
    """The backends that may serve tensors of a device; the others are not asked.

    To word their reasons would cost as much as the kernel of a small batch.
    """
    found = _served.get((op, device))
    if found is None:
        found = _served[op, device] = tuple(
            backend
            for backend in _backends_of(op).values()
            if not device or device in devices.SERVED.get(backend.name, (device,))
        )
    return found


def _in_turn(candidates: tuple[Backend, ...], call: tuple[Any, ...]) -> tuple[Backend, ...]:
    """The candidates, the first behind the other kernels if it yields on this call."""
    first, *others = candidates
    if first.yields is None or not first.yields(*call):
        return candidates
    kernels = [backend for backend in others if backend.name != "reference"]
    return (*kernels, first, *others[len(kernels) :])


def _named(op: str, name: str) -> Backend:
    available = _backends_of(op)
    if name not in available:
        raise ValueError(f"backend: expected one of {', '.join(available)} for {op}, got {name!r}")
    return available[name]


def _check_preference(name: str, op: str | None) -> None:
    if name not in (*NAMES, AUTO):
        raise ValueError(f"name: expected one of {', '.join((*NAMES, AUTO))}, got {name!r}")
    if op is not None and name != AUTO:
        _named(op, name)


def _preference(op: str) -> str:
    if _scoped.entered:
        for scope, name in reversed(_scoped.entered):
            if scope in (op, EVERY_OP):
                return name
    return (_preferred.get(op) or _preferred.get(EVERY_OP) or AUTO) if _preferred else AUTO


def _device_type(value: Any) -> str:
    """That of the tensor that a call begins with, or what is nested in it."""
    while isinstance(value, tuple) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor):
        return ""
    return "cpu" if value.is_cpu else value.device.type


def _refusal_text(backend: Backend, refusal: Sequence[str]) -> str:
    return f"backend {backend.name!r} cannot serve this call of {backend.op}: {'; '.join(refusal)}"


def _fall_back(backend: Backend, refusal: Sequence[str]) -> None:
    text = _refusal_text(backend, refusal)
    if _strict:
        raise BackendError(text + " (strict mode: no fallback)")
    if torch.compiler.is_compiling():
        return
    key = (backend.op, backend.name, text)
    if key not in _logged:
        _logged.add(key)
        _log.info("%s; another backend runs", text)


def _read_environment() -> None:
    """R1KERNELS_BACKEND=name or op:name,op:name,*:name; ops are not registered yet, so only the names are checked."""
    for part in filter(None, os.environ.get("R1KERNELS_BACKEND", "").replace(" ", "").split(",")):
        op, _, name = part.rpartition(":")
        if name not in (*NAMES, AUTO):
            raise ValueError(f"R1KERNELS_BACKEND: expected one of {', '.join((*NAMES, AUTO))}, got {name!r}")
        _preferred[op or EVERY_OP] = name
    set_strict(os.environ.get("R1KERNELS_STRICT", "0") not in ("", "0"))


_read_environment()
