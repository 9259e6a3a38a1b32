"""The torch ops of the log-prob family on rows of logits: schemas and fakes, for the backends cpu, cuda and triton.

They exist without the extension; it (cpu, cuda) and triton.py add the implementations. ``Rows`` holds the arguments that
all of them share; (B, T, V) is the shape of the logits, N = B * T.

    token_logprobs_<backend>(logits, *rows, entropy, extra) -> (logp, entropy, stats, extra)
        logits        (B, T, V) float32, bfloat16 or float16; any strides on B and T, stride 1 on V
        logp          (N,) float32
        entropy       (N,) float32, or (0,) where it was not asked for
        stats         (3, N) float32: M, S', E' of reference.py, for the backward of the same backend alone; M is the
                      largest logit before the division by the temperature, E' is 0 without entropy
        extra         (3, N) float32: log_sum_sq_probs, mean_logits, is_top1 (1 or 0) of linear_logprobs; else (0, N)
    token_logprobs_<backend>_backward(logits, *rows, logp, stats, grad_logp, grad_entropy, sequences) -> grad
        grad_logp, grad_entropy  (N,) float32, contiguous, or None for no gradient
        sequences     (N,) int32, contiguous: row r takes grad_logp[sequences[r]] and grad_entropy[sequences[r]], which
                      then have one entry a sequence; or None
        grad          (B, T, V) in the dtype of the logits, contiguous
    token_logprobs_<backend>_backward_(logits, ...the same...) -> ()
        the gradient is written over the logits
    token_logprobs_cpu_backward_into(logits, ...the same..., grad) -> ()
        the gradient is written to ``grad``, on the CPU alone

A slab, some columns of a larger vocabulary (``vocabulary`` > V), gives parts for the caller to merge: stats of these
columns, logp = the logit of the target before the division by the temperature (NaN where the target lies in another slab,
0 where it is ignored), an empty entropy and the ``extra`` of these columns' own distribution; ``entropy`` then says whether
E' is wanted. The backward of a slab takes the merged stats and the final logp.

A target out of range that is not ``ignore_index``, or a temperature that is not above 0: a RuntimeError from the cpu
op, NaN in that row on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("cpu", "cuda", "triton")

ROWS = (
    "Tensor? bias, float logit_scale, float softcap, Tensor targets, Tensor? temperatures, float temperature, "
    "int ignore_index, SymInt first, SymInt vocabulary"
)
GRADS = "Tensor logp, Tensor stats, Tensor? grad_logp, Tensor? grad_entropy, Tensor? sequences"


class Rows(NamedTuple):
    """What every op is told about its rows, in the order of its arguments.

    A raw logit r in column v stands for the logit z = cap(logit_scale * (r + bias_v)), cap(u) = softcap tanh(u / softcap),
    or u where softcap is 0; the gradient is that of r.
    """

    bias: Tensor | None  # (V,) float32, contiguous
    logit_scale: float
    softcap: float
    targets: Tensor  # (N,) int64, contiguous, in [0, vocabulary) or ignore_index
    temperatures: Tensor | None  # (N,) float32, contiguous; None: ``temperature`` holds for all rows
    temperature: float
    ignore_index: int
    first: int  # the logits are the columns [first, first + V)
    vocabulary: int  # of a vocabulary of this size


library = torch.library.Library("r1kernels", "FRAGMENT")


def _fake_forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rows, entropy, extra = arguments
    whole = Rows(*rows).vocabulary == logits.shape[2]
    count = logits.shape[0] * logits.shape[1]
    return (
        logits.new_empty(count, dtype=torch.float32),
        logits.new_empty(count if entropy and whole else 0, dtype=torch.float32),
        logits.new_empty((3, count), dtype=torch.float32),
        logits.new_empty((3 if extra else 0, count), dtype=torch.float32),
    )


def _fake_backward(logits: Tensor, *unused: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_backward_inplace(logits: Tensor, *unused: object) -> None:
    return None


for _backend in BACKENDS:
    _name = f"token_logprobs_{_backend}"
    library.define(
        f"{_name}(Tensor logits, {ROWS}, bool entropy, bool extra) -> "
        "(Tensor logp, Tensor entropy, Tensor stats, Tensor extra)"
    )
    library.define(f"{_name}_backward(Tensor logits, {ROWS}, {GRADS}) -> Tensor")
    library.define(f"{_name}_backward_(Tensor(a!) logits, {ROWS}, {GRADS}) -> ()")
    torch.library.register_fake(f"r1kernels::{_name}", _fake_forward, lib=library)
    torch.library.register_fake(f"r1kernels::{_name}_backward", _fake_backward, lib=library)
    torch.library.register_fake(f"r1kernels::{_name}_backward_", _fake_backward_inplace, lib=library)

library.define(f"token_logprobs_cpu_backward_into(Tensor logits, {ROWS}, {GRADS}, Tensor(a!) grad) -> ()")
torch.library.register_fake(
    "r1kernels::token_logprobs_cpu_backward_into", _fake_backward_inplace, lib=library
)

namespace = torch.ops.r1kernels


def forward(
    backend: str, logits: Tensor, rows: Rows, entropy: bool, extra: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``token_logprobs_<backend>``: (logp, entropy, stats, extra)."""
    return getattr(namespace, f"token_logprobs_{backend}")(logits, *rows, entropy, extra)


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
    """``token_logprobs_<backend>_backward``: the gradient of the raw logits."""
    op = getattr(namespace, f"token_logprobs_{backend}_backward")
    return op(logits, *rows, logp, stats, grad_logp, grad_entropy, sequences)


def backward_(
    backend: str,
    logits: Tensor,
    rows: Rows,
    logp: Tensor,
    stats: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    sequences: Tensor | None = None,
) -> None:
    """``token_logprobs_<backend>_backward_``: the gradient of the raw logits, written over them."""
    op = getattr(namespace, f"token_logprobs_{backend}_backward_")
    op(logits, *rows, logp, stats, grad_logp, grad_entropy, sequences)
