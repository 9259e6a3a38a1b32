"""How exact is exact: the pass rule of every kernel test."""

from __future__ import annotations

import torch
from torch import Tensor

# unit roundoff, and the most that any error may be, relative to the largest value
ROUNDOFF = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
CAP = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def assert_as_exact_as(ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Our error is at most twice that of eager PyTorch plus a few roundings of ``dtype``, and below its cap.

    Errors are largest differences over the largest exact value; NaN and infinities must stand in the same places. The
    worst error of few results says little about eager PyTorch: then some roundings more are allowed.
    """
    exact = exact.double()
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(ours), finite), (
        "NaN or infinities in other places than the exact result"
    )
    if not finite.any():
        return
    scale = exact[finite].abs().max().clamp(min=1e-30)
    error = (ours.double() - exact)[finite].abs().max() / scale
    peer = (eager.double() - exact)[finite].abs().max() / scale
    allowed = min(2 * float(peer.nan_to_num(torch.inf)) + 4 * ROUNDOFF[dtype], CAP[dtype])
    assert error <= allowed, f"error {error:.3g} above the allowed {allowed:.3g} (eager has {peer:.3g})"


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree byte for byte, NaN included."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(
            first.contiguous().flatten().view(torch.uint8), second.contiguous().flatten().view(torch.uint8)
        )
    )
