"""Argument checks shared by all public ops: each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOAT32 = torch.finfo(torch.float32)
_STRIDED = torch.strided
# by name: to import them is slow
_PLAIN = {
    "DTensor": "full_tensor() or to_local() makes one of it",
    "MaskedTensor": "get_data() and get_mask() are two",
}
_debug = False


def debug_checks(enabled: bool) -> None:
    """Check the values inside CUDA tensors too (targets, indices, temperatures, rewards), at the price of a host sync.

    On the CPU in eager mode values are always checked.
    """
    global _debug
    _debug = boolean("enabled", enabled)


def debugging() -> bool:
    """Whether ``debug_checks(True)`` holds."""
    return _debug


def values_visible(*tensors: Tensor | None) -> bool:
    """Whether values inside the tensors may be looked at now: eager, and on the CPU or with ``debug_checks(True)``."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and (_is_symbolic(tensor) or not (tensor.is_cpu or _debug)):
            return False
    return True


def tensor(
    name: str,
    value: Any,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    shape: Sequence[int | None] | None = None,
    ndim: int | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """Check that ``value`` is a tensor of one of ``dtypes``, of ``shape`` (None: any size there), on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if type(value) is not Tensor or value.layout is not _STRIDED or value.is_nested:
        _whole(name, value)
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_one_of(dtypes)}, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")
    if shape is not None and value.shape != shape and not _fits(shape, value.shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {value.device}")
    return value


def choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Check that ``value`` is one of ``choices``, which are names."""
    options = tuple(choices)
    if not isinstance(value, str) or value not in options:
        shown = repr(value) if isinstance(value, (str, float, int, type(None))) else type(value).__name__
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {shown}")
    return value


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """Check that ``value`` is an int (a bool is not), of Python or NumPy, and at least ``minimum``; the result is one of Python."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        value = int(value)  # NumPy's
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int that 64 bits hold, got one of {value.bit_length()} bits")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """Check that ``value`` is a finite number, of Python or NumPy; the result is one of Python."""
    if type(value) is not float and type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        value = float(value)  # NumPy's
    if not -sys.float_info.max <= value <= sys.float_info.max:
        shown = value if isinstance(value, float) else f"an int of {value.bit_length()} bits"
        raise ValueError(f"{name}: expected a finite number, got {shown}")
    return value


def positive(name: str, value: Any) -> float:
    """Check that ``value`` is a finite number above 0, also in float32."""
    value = number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:
        raise ValueError(f"{name}: expected a number that float32 holds, got {value}")
    return value


def boolean(name: str, value: Any) -> bool:
    """Check that ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def in_range(name: str, value: Tensor, low: int, high: int, *, allow: int | None = None) -> None:
    """Raise IndexError at the first entry of an integer tensor outside [low, high) that is not ``allow``.

    Call it only where ``values_visible(value)``.
    """
    # most calls end here, at a tenth of the price of what follows
    if _within(value, low, high):
        return
    if allow is not None and _within(value.masked_fill(value == allow, low), low, high):
        return
    bad = (value < low) | (value >= high)
    if allow is not None:
        bad &= value != allow
    position = first_bad(bad)
    besides = "" if allow is None else f" or {allow}"
    raise IndexError(
        f"{name}: expected values in [{low}, {high}){besides}, got {int(value[position])} at {_show(position)}"
    )


def boundaries(name: str, value: Tensor, last: int) -> None:
    """Raise ValueError unless the entries of an integer tensor (B + 1,) are 0, ..., ``last`` and never fall.

    Call it only where ``values_visible(value)``.
    """
    entries = value.tolist()
    if (entries[0], entries[-1]) != (0, last):
        raise ValueError(
            f"{name}: expected the first entry 0 and the last {last}, got {entries[0]} and {entries[-1]}"
        )
    if entries != sorted(entries):
        at = next(i for i in range(1, len(entries)) if entries[i] < entries[i - 1])
        raise ValueError(
            f"{name}: expected entries that never fall, got {entries[at]} at {at} after {entries[at - 1]}"
        )


def all_positive(name: str, value: Tensor) -> None:
    """Raise ValueError at the first entry that is not a finite number above 0, also in float32.

    Call it only where ``values_visible(value)``.
    """
    bad = ~((value >= _FLOAT32.tiny) & (value <= _FLOAT32.max))
    if bool(bad.any()):
        position = first_bad(bad)
        found = float(value[position])
        wanted = "that float32 holds" if found > 0 else "above 0"
        raise ValueError(f"{name}: expected values {wanted}, got {found} at {_show(position)}")


def all_in_unit(name: str, value: Tensor) -> None:
    """Raise ValueError at the first entry outside of [0, 1). Call it only where ``values_visible(value)``."""
    bad = ~((value >= 0) & (value < 1))
    if bool(bad.any()):
        position = first_bad(bad)
        raise ValueError(
            f"{name}: expected values in [0, 1), got {float(value[position])} at {_show(position)}"
        )


def overlaps(value: Tensor) -> bool:
    """Whether entries of ``value`` share memory, as those of an expanded tensor do; of other strides than a view has: may share."""
    extent = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent = stride * size
    return False


def first_bad(bad: Tensor) -> tuple[int, ...]:
    """The index of the first True in ``bad``, row-major."""
    return tuple(int(entry) for entry in bad.nonzero()[0])


def first_derivative_only(op: str, grad: Tensor, *inputs: Tensor) -> Tensor:
    """``grad``, computed inside a backward by a kernel, such that differentiating it again raises a clear error.

    Without it autograd would take the gradient for a constant under ``create_graph=True``, silently.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad
    return _FirstDerivativeOnly.apply(op, grad, *inputs)


class _FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *inputs: Tensor) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"{ctx.op}: a second derivative is not implemented")


def _whole(name: str, value: Tensor) -> None:
    """Raise TypeError at a tensor whose values do not all lie in memory of its own; other subclasses are taken as they are."""
    kind = type(value).__name__
    if kind in _PLAIN:
        raise TypeError(f"{name}: expected a plain tensor, got a {kind}: {_PLAIN[kind]}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    if value.layout is not _STRIDED:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}")


def _within(value: Tensor, low: int, high: int) -> bool:
    if value.numel() == 0:
        return True
    smallest, largest = value.aminmax()
    return bool(low <= smallest.item() <= largest.item() < high)


def _fits(wanted: Sequence[int | None], found: Sequence[int]) -> bool:
    return len(wanted) == len(found) and all(
        want is None or want == got for want, got in zip(wanted, found, strict=True)
    )


def _is_symbolic(value: Tensor) -> bool:
    return (
        isinstance(value, torch._subclasses.FakeTensor)
        or value.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _one_of(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _show(position: tuple[int, ...]) -> str:
    return f"position {position[0] if len(position) == 1 else position}"
