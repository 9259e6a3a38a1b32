"""What the kernels of this family take: numbers in a small tensor on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


def without_values() -> bool:
    """Whether tensors that are made here have no values: inside torch.compile, or a FakeTensorMode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


def numbers_tensor(numbers: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers as a tensor, for torch.compile specialises on float arguments of kernels."""
    if not without_values():
        return torch.frombuffer(array("f" if dtype == torch.float32 else "d", numbers), dtype=dtype)
    # a constructor would fix them, a product does not
    one = torch.ones((), dtype=dtype, device="cpu")
    return torch.stack([one * number for number in numbers])
