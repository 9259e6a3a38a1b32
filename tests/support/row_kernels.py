"""The row kernels of a backend, called with what a test has at hand."""

from __future__ import annotations

from torch import Tensor

from r1kernels.logprob import token
from r1kernels.logprob.token import Rows, Upstream


def forward(
    backend: str, logits: Tensor, rows: Rows, with_entropy: bool, extra: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, stats, extra)"""
    return token.FORWARD(backend, token.RowsCall(logits, rows, with_entropy, extra))


def backward(
    backend: str,
    logits: Tensor,
    rows: Rows,
    logp: Tensor,
    stats: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    sequences: Tensor | None = None,
) -> Tensor:
    """The gradient of the raw logits."""
    upstream = Upstream(logp, stats, grad_logp, grad_entropy, sequences)
    return token.BACKWARD(backend, token.RowsBackwardCall(logits, rows, upstream))


def backward_over(backend: str, logits: Tensor, rows: Rows, *saved: Tensor | None) -> None:
    """The same, written over the logits; ``saved`` as ``backward`` takes it."""
    upstream = Upstream(*saved, *[None] * (5 - len(saved)))
    token.BACKWARD_OVER(backend, token.RowsBackwardOverCall(logits, rows, upstream))
