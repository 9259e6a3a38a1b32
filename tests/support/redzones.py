"""Tensors inside larger buffers of a canary: a kernel that writes past an end, or reads past it, is found out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.numerics import same_bits

PAD = 128  # elements on either side; a multiple of every vector width, so that the tensor is aligned as usual


class Redzones:
    """Hands out tensors; ``check`` asserts that nothing but the outputs has changed.

    Floats stand between NaN and indices between a huge number: whatever is read from outside shows in the results.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    def output(self, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        """A contiguous tensor for a kernel to write, filled with the canary; ``offset`` shifts it in memory."""
        return self._place(lambda buffer: buffer[:], shape, dtype, offset, writable=True)

    def input(
        self,
        values: Tensor,
        layout: Callable[[Tensor], Tensor] = lambda buffer: buffer,
        shape: tuple[int, ...] | None = None,
        offset: int = 0,
        writable: bool = False,
    ) -> Tensor:
        """A copy of ``values`` on the device: the view that ``layout`` takes of a buffer of ``shape``, full of the canary."""
        view = self._place(layout, shape or tuple(values.shape), values.dtype, offset, writable)
        view.copy_(values)
        buffer, _, mask = self._held[-1]
        self._held[-1] = (buffer, buffer.clone(), mask)
        return view

    def check(self) -> None:
        for buffer, before, writable in self._held:
            assert same_bits(buffer[~writable], before[~writable]), (
                "something outside the outputs was written"
            )

    def _place(
        self,
        layout: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        offset: int,
        writable: bool,
    ) -> Tensor:
        canary = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max // 2 + 2
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * PAD + offset,), canary, dtype=dtype, device=self.device)
        mask = torch.zeros_like(buffer, dtype=torch.bool)
        inside = slice(PAD + offset, PAD + offset + size)
        if writable:
            layout(mask[inside].view(shape)).fill_(True)
        self._held.append((buffer, buffer.clone(), mask))
        return layout(buffer[inside].view(shape))
