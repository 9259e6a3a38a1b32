"""The torch ops of token_logprobs: schemas and fakes, for the backends cpu, cuda and triton.

They exist without the extension; it (cpu, cuda) and triton.py add the implementations. Called from autograd.py.

    token_logprobs_<backend>(logits, targets, temperatures, temperature, ignore_index, entropy) -> (logp, entropy, stats)
        logits        (B, T, V) float32, bfloat16 or float16; any strides on B and T, stride 1 on V
        targets       (B * T,) int64, contiguous
        temperatures  (B * T,) float32, contiguous, or None: ``temperature`` holds for all tokens
        logp          (B * T,) float32
        entropy       (B * T,) float32, or (0,) where it was not asked for
        stats         (3, B * T) float32: M, S', E' of reference.py, for the backward of the same backend alone; M is the
                      largest logit before the division by the temperature, E' is 0 without entropy
    token_logprobs_<backend>_backward(logits, ..., ignore_index, logp, stats, grad_logp, grad_entropy) -> grad
        grad_logp, grad_entropy  (B * T,) float32, contiguous, or None for no gradient
        grad          (B, T, V) in the dtype of the logits, contiguous
    token_logprobs_<backend>_backward_(logits, ...the same...) -> ()
        the gradient is written over the logits

A target out of range that is not ``ignore_index``, or a temperature that is not above 0: a RuntimeError from the cpu
op, NaN in that row on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("cpu", "cuda", "triton")

_CALL = "Tensor targets, Tensor? temperatures, float temperature, int ignore_index"
_GRADS = "Tensor logp, Tensor stats, Tensor? grad_logp, Tensor? grad_entropy"

library = torch.library.Library("r1kernels", "FRAGMENT")


def _fake_forward(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0] * logits.shape[1]
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows if entropy else 0, dtype=torch.float32),
        logits.new_empty((3, rows), dtype=torch.float32),
    )


def _fake_backward(logits: Tensor, *unused: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_backward_inplace(logits: Tensor, *unused: object) -> None:
    return None


for _backend in BACKENDS:
    _name = f"token_logprobs_{_backend}"
    library.define(
        f"{_name}(Tensor logits, {_CALL}, bool entropy) -> (Tensor logp, Tensor entropy, Tensor stats)"
    )
    library.define(f"{_name}_backward(Tensor logits, {_CALL}, {_GRADS}) -> Tensor")
    library.define(f"{_name}_backward_(Tensor(a!) logits, {_CALL}, {_GRADS}) -> ()")
    torch.library.register_fake(f"r1kernels::{_name}", _fake_forward, lib=library)
    torch.library.register_fake(f"r1kernels::{_name}_backward", _fake_backward, lib=library)
    torch.library.register_fake(f"r1kernels::{_name}_backward_", _fake_backward_inplace, lib=library)

namespace = torch.ops.r1kernels
