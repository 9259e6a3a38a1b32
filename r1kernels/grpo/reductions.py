"""From a mask to the weight of every token in the loss: the denominators of the published losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .layout import Layout, layout_of

REDUCTIONS: dict[str, tuple[str, ...]] = {
    "sequence": ("num_sequences",),
    "token": ("num_tokens",),
    "constant": ("num_sequences", "max_length"),
    "sequence-sum": ("num_sequences",),
}
"""For each reduction the totals that it uses."""


COUNTS = ("one", "sequence", "batch", "longest")
"""What the divisor of a weight is multiplied by: 1; the counted tokens of the sequence, or of the call (at least 1 each);
the length of the longest packed sequence."""


class Totals(NamedTuple):
    """The totals of an optimizer step, see ``reduction_weights``."""

    num_sequences: int | float | Tensor | None
    num_tokens: int | float | Tensor | None
    max_length: int | float | Tensor | None


def reduction_weights(
    mask: Tensor,
    reduction: str,
    *,
    num_sequences: int | float | Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    max_length: int | float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""The weight w of every token in ``loss = sum_t w_t m_t l_t``, for a named reduction.

    ============== ========================== =======================
    reduction      w of a counted token       used by
    ============== ========================== =======================
    "sequence"     1 / (B max(sum m_i, 1))    GRPO, GSPO, SAPO
    "token"        1 / max(sum m, 1)          BNPO, DAPO, CISPO, VESPO
    "constant"     1 / (B L)                  Dr. GRPO
    "sequence-sum" 1 / B                      LUSPO
    ============== ========================== =======================

    B, sum m and L are totals of the whole optimizer step: give them as ``num_sequences``, ``num_tokens`` and
    ``max_length`` where the step consists of several micro-batches (divided by the number of ranks under a wrapper
    that averages gradients). Without them this call is taken to be the whole step.

    Args:
        mask: bool or integer, (B, T), or (N,) with ``cu_seqlens``; not 0: the token counts.
        reduction: a name of the table.
        num_sequences: B, a number above 0 or a tensor of one; default: the sequences of this call, the empty ones too.
        num_tokens: sum m, likewise; default: the counted tokens of this call.
        max_length: L, likewise; default: T, or the longest packed sequence. Dr. GRPO means a constant of the whole run,
            so give it.
        cu_seqlens: int32 or int64 (B + 1,), the boundaries of packed sequences.

    Returns:
        w, float32, shaped like ``mask``; 0 where the mask is 0.

    Raises:
        ValueError: an unknown reduction, a total that it does not use, a total that is not above 0, a wrong shape.
        TypeError: a wrong type or dtype.

    No value is read on the host, so totals given as tensors cost no synchronisation.
    """
    layout = layout_of(mask, cu_seqlens)
    checks.choice("reduction", reduction, REDUCTIONS)
    totals = Totals(num_sequences, num_tokens, max_length)
    check_totals(reduction, totals, mask)
    return token_weights(layout, reduction, totals, cu_seqlens, torch.float32)


def check_totals(reduction: str, totals: Totals, like: Tensor) -> None:
    """Check the totals given for a known reduction, and refuse those that it does not use."""
    for name, value in zip(Totals._fields, totals, strict=True):
        if value is None:
            continue
        if name not in REDUCTIONS[reduction]:
            raise ValueError(f"{name}: not used by reduction {reduction!r}, got {value!r}")
        if not isinstance(value, Tensor):
            checks.positive(name, value)
            continue
        checks.tensor(name, value, like=like if value.ndim else None)
        if value.numel() != 1:
            raise ValueError(
                f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}"
            )


class Divisor(NamedTuple):
    """The weight of a token is 1 / (number * total * counted)."""

    number: float
    total: Tensor | None
    """float32 (1,), or None for 1: what was given as tensors."""
    counted: str
    """A name of COUNTS."""


ONE = Divisor(1.0, None, "one")


def divisor_of(reduction: str, totals: Totals, mask: Tensor, cu_seqlens: Tensor | None) -> Divisor:
    """Of what a named reduction consists, for checked arguments; nothing is counted or read."""
    count = "sequence" if reduction == "sequence" else "one"
    number: float = 1.0
    total = None
    for name in REDUCTIONS[reduction]:
        value: Any = getattr(totals, name)
        if value is None and name == "num_sequences":
            value = max(mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, 1)
        elif value is None and name == "max_length" and cu_seqlens is None:
            value = max(mask.shape[1], 1)
        if value is None:
            count = {"num_tokens": "batch", "max_length": "longest"}[name]
        elif isinstance(value, Tensor):
            value = value.detach().reshape(1).to(mask.device, torch.float32)
            total = value if total is None else total * value
        else:
            number = number * value
    return Divisor(number, total, count)


def token_weights(
    layout: Layout, reduction: str, totals: Totals, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """w for checked arguments, 0 where a token does not count."""
    number, total, count = divisor_of(reduction, totals, layout.mask, cu_seqlens)
    # a product with a tensor: torch.compile carries a number that changes through it
    divisor = torch.ones((), dtype=dtype, device=layout.mask.device) * number
    if total is not None:
        divisor = divisor * total.reshape(()).to(dtype)
    if count == "sequence":
        return layout.keep(layout.spread(1 / (divisor * layout.lengths(dtype).clamp(min=1))))
    if count == "batch":
        divisor = divisor * layout.mask.sum().clamp(min=1)
    elif cu_seqlens is not None and count == "longest":
        lengths = cu_seqlens.diff()
        divisor = divisor * (lengths.amax().clamp(min=1) if lengths.numel() else 1)
    return layout.keep((1 / divisor).expand(layout.mask.shape))
