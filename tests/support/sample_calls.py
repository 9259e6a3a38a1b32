"""The sample call of a public op as a function of its differentiable arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import r1kernels
from bench.studies.overhead import LEADING
from r1kernels import examples


def first(result: Any) -> Tensor:
    """The result that has a gradient, where one has."""
    return result if isinstance(result, Tensor) else result[0]


def differentiable_call(op: str, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """(the op as a function of its differentiable arguments, these arguments) for the CPU."""
    args, kwargs = examples.calls("cpu")[op]
    places = [
        place
        for place, value in enumerate(args[: LEADING.get(op, len(args))])
        if isinstance(value, Tensor) and value.is_floating_point()
    ]

    def function(*leaves: Tensor) -> Any:
        given = list(args)
        for place, leaf in zip(places, leaves, strict=True):
            given[place] = leaf
        return getattr(r1kernels, op)(*given, **{**kwargs, **options})

    return function, [args[place].clone().requires_grad_() for place in places]
