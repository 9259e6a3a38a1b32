"""grouped_gemm with offsets that no one could check, as on a GPU: no memory is left as it was, and nothing else is reached.

S rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OFFSETS = (  # of 20 rows and 3 experts
    (5, 9, 9, 20),  # rows before the first one and
    (5, 8, 12, 14),  # behind the last one are no one's
    (20, 20, 20, 20),
    (0, 30, 5, 40),
    (-9, 3, 7, 99),
    (0, 20, 0, 20),
    (3, 2, 9, 1),
    (-(2**31), 2**31 - 1, 0, 4),
)


def assert_every_row_is_written(gemm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """An offset counts as the largest up to it, cut to [0, S]; rows that no expert has are 0 and pass no gradient."""
    for offsets in OFFSETS:
        x, weight, grad = torch.randn(20, 16), torch.randn(3, 8, 16), torch.randn(20, 8)
        bounds = [max(min(max(offset, 0), 20) for offset in offsets[: place + 1]) for place in range(4)]
        out, d_x, d_weight = torch.zeros(20, 8), torch.zeros(20, 16), torch.zeros(3, 8, 16)
        owned = torch.zeros(20, dtype=torch.bool)
        for expert in range(3):
            rows = slice(bounds[expert], bounds[expert + 1])
            owned[rows] = True
            out[rows] = x[rows] @ weight[expert].T
            d_x[rows] = grad[rows] @ weight[expert]
            d_weight[expert] = grad[rows].T @ x[rows]
        x[~owned], grad[~owned] = torch.nan, torch.nan
        leaves = x.requires_grad_(), weight.requires_grad_()
        ours = gemm(*leaves, torch.tensor(offsets, dtype=torch.int32, device=x.device))
        grads = torch.autograd.grad(ours, leaves, grad)
        for result, expected in zip((ours.detach(), *grads), (out, d_x, d_weight), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5, msg=f"{offsets}: {result}")
