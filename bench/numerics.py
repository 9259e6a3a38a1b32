"""When a result counts: the error against float64, and the most that a row may show."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# unit roundoff, and the most that any error may be, both relative to the largest exact value
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
CAP = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


class Exact(NamedTuple):
    """Values in float64, of all of a result or of some places along its first dimension."""

    values: Tensor
    places: Tensor | None = None


def error(found: Tensor, exact: Exact) -> float:
    """The largest difference over the largest exact value; infinite where NaN or infinities stand in other places."""
    part = found.detach() if exact.places is None else found.detach()[exact.places]
    part = part.to(exact.values.device, torch.float64).reshape(exact.values.shape)
    finite = torch.isfinite(exact.values)
    if not torch.equal(torch.isfinite(part), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = exact.values[finite].abs().max().clamp(min=1e-30)
    return float((part - exact.values)[finite].abs().max() / scale)


def allowed(eager_error: float | None, dtype: torch.dtype) -> float:
    """Twice the error of eager PyTorch in the same dtype plus a few roundings, and at most the cap of the dtype."""
    slack = 4 * ROUNDOFF[dtype]
    return CAP[dtype] if eager_error is None else min(2 * eager_error + slack, CAP[dtype])
