"""linear_logprobs and its gradients in float64 by torch's own log_softmax and autograd. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class Results(NamedTuple):
    logp: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    grad: Tensor  # of the raw logits


def of_logits(
    raw: Tensor, head: Head, targets: Tensor, temperature: float | Tensor, ignore_index: int = -100
) -> tuple[Tensor, ...]:
    """(logp, entropy, log_sum_sq_probs, mean_logits, is_top1) of raw logits (N, V), 0 where ignored."""
    logits = raw if head.bias is None else raw + head.bias
    logits = head.logit_scale * logits
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    x = logits / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    log_probs = torch.log_softmax(x, -1)
    ignored = targets == ignore_index
    chosen = torch.where(ignored, 0, targets).unsqueeze(-1)
    probs = log_probs.exp()
    values = (
        log_probs.gather(-1, chosen).squeeze(-1),
        -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1),
        probs.square().sum(-1).log(),
        x.mean(-1),
    )
    is_top1 = (x.argmax(-1) == targets) & ~ignored
    return *(value.masked_fill(ignored, 0.0) for value in values), is_top1


def from_raw(
    raw: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float | Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
) -> Results:
    """Values, and the gradient of the raw logits for upstream gradients (N,)."""
    leaf = raw.detach().double().requires_grad_()
    head = head._replace(bias=None if head.bias is None else head.bias.double())
    temperature = temperature.double() if isinstance(temperature, Tensor) else temperature
    values = of_logits(leaf, head, targets, temperature)
    loss = (values[0] * grad_logp.double() + values[1] * grad_entropy.double()).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return Results(*(value.detach() for value in values), grad)
