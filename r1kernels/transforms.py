"""Which transforms of PyTorch see nothing of a kernel: sentences for ``backends``.

A kernel is an opaque op whose gradient is an autograd function around it. Forward-mode derivatives, ``torch.func`` (grad, vmap,
jvp, ...) and ``torch.export`` look at the op alone: they would drop a derivative without a word. The reference is plain PyTorch,
which all of them follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether ``torch.func`` or ``torch.export`` looks on, so that an autograd function must not be entered."""
    # an export is compiled too
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._are_functorch_transforms_active()


def reasons(call: tuple[Any, ...]) -> tuple[str, ...]:
    """Why no kernel can serve a call with these arguments."""
    forward_mode = forward_ad._current_level >= 0
    if not (forward_mode or active()):
        return ()
    tensors = list(_tensors(call))
    if forward_mode and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return ("an argument has a forward-mode derivative, which the reference alone computes",)
    if torch.compiler.is_exporting():
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return (
                "torch.export keeps the gradients of the reference alone (under torch.no_grad() it takes kernels)",
            )
        return ()
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        return ("an argument is inside a transform of torch.func, which follows the reference alone",)
    return ()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
