"""token_logprobs in plain PyTorch: the oracle, exact where the textbook form cancels.

Shapes: B, T leading dimensions, N = B * T tokens, V vocabulary. Rows have no bias, scale or cap here. With x_v = z_v / temperature for logits z,
M = max_v x_v, and sums over all v but one maximum:

    S' = sum e^(x_v - M)          E' = sum e^(x_v - M) (M - x_v)
    logp = (x_y - M) - log1p(S')  entropy = log1p(S') + E' / (1 + S')

No term cancels, so logp <= 0 and entropy >= 0 hold by construction; ``log_softmax`` and ``lse - sum p x`` lose
everything once one logit leads by 20 nats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .token import Rows, RowsBackwardCall, RowsCall


def forward(call: RowsCall) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob (N,), entropy (N,) or empty, and the statistics M, S', E' as (3, N); M is divided by the temperature here.

    A target outside [0, V) that is not ``ignore_index`` gives NaN in its row.
    """
    targets = call.rows.targets
    x = scaled(call.logits, call.rows)
    stats = sums(x, call.with_entropy)
    largest, sum_others, spread = stats.unbind(0)
    # -inf alone has no distribution
    sum_others = torch.where(largest == -torch.inf, torch.nan, sum_others)
    ignored = targets == call.rows.ignore_index
    log_normaliser = sum_others.log1p()
    logp = chosen(x, targets) - largest - log_normaliser
    logp = logp.masked_fill(ignored, 0.0)
    if not call.with_entropy:
        return logp, logp.new_empty(0), stats
    entropy = log_normaliser + spread / (1 + sum_others)
    entropy = torch.where((targets >= 0) & (targets < x.shape[-1]), entropy, torch.nan)
    return logp, entropy.masked_fill(ignored, 0.0), stats


def sums(x: Tensor, with_entropy: bool) -> Tensor:
    """M, S', E' (3, N) of logits (N, V) that are divided by the temperature; E' is 0 without entropy.

    S' is 0 where all of them are -inf, as a part of a vocabulary may be.
    """
    largest, position = x.max(dim=-1, keepdim=True)
    shifted = x - largest
    others = shifted.exp().scatter(-1, position, 0.0)
    largest = largest.squeeze(-1)
    # a logit at +inf has no finite normaliser: its row is NaN, as for log_softmax; so is that of NaN, if it is the only one too
    sum_others = torch.where(largest < torch.inf, others.sum(dim=-1), torch.nan)
    sum_others = torch.where(largest == -torch.inf, 0.0, sum_others)
    if not with_entropy:
        return torch.stack((largest, sum_others, torch.zeros_like(sum_others)))
    # -inf logits have probability 0 and contribute 0, never 0 * inf, in the gradient by autograd neither
    present = others > 0
    spread = torch.where(present, others * -shifted.masked_fill(~present, 0.0), 0.0).sum(dim=-1)
    return torch.stack((largest, sum_others, spread))


def chosen(x: Tensor, targets: Tensor, first: int = 0) -> Tensor:
    """The logit of the target (N,) out of the columns [first, first + V) of the vocabulary; NaN where it is in no such."""
    place = targets - first
    here = (place >= 0) & (place < x.shape[-1])
    return torch.where(here, x.gather(-1, torch.where(here, place, 0).unsqueeze(-1)).squeeze(-1), torch.nan)


def backward(call: RowsBackwardCall) -> Tensor:
    """The gradient of the logits (B, T, V), in their dtype; of a slab too, whose log-prob and statistics are given."""
    logits, rows, (logp, stats, grad_logp, grad_entropy, _) = call
    targets = rows.targets
    x = scaled(logits, rows)
    largest, sum_others, spread = stats.unsqueeze(-1).unbind(0)
    shifted = x - largest
    probs = shifted.exp() / (1 + sum_others)
    grad = torch.zeros_like(x)
    if grad_logp is not None:
        # d logp / d x_v = 1[v = y] - p_v, and 1 - p_y = -expm1(logp) does not round to 0 for a leading target
        place = targets - rows.first
        here = ((place >= 0) & (place < x.shape[-1])).unsqueeze(-1)
        place = torch.where(here, place.unsqueeze(-1), 0)
        at_target = torch.where(here, -logp.expm1().unsqueeze(-1), -probs.gather(-1, place))
        grad = grad_logp.unsqueeze(-1) * (-probs).scatter(-1, place, at_target)
    if grad_entropy is not None:
        # d H / d x_v = p_v ((M - x_v) - E' / (1 + S'))
        inner = torch.where(probs > 0, probs * (-shifted - spread / (1 + sum_others)), 0.0)
        inner = torch.where(probs.isnan(), probs, inner)
        grad = grad + grad_entropy.unsqueeze(-1) * inner
    if rows.temperatures is not None:
        grad = grad / rows.temperatures.unsqueeze(-1)
    elif rows.temperature != 1.0:
        grad = grad / rows.temperature
    inside = (targets >= 0) & (targets < rows.vocabulary)
    grad = torch.where(inside.unsqueeze(-1), grad, torch.nan)
    grad = grad.masked_fill((targets == rows.ignore_index).unsqueeze(-1), 0.0)
    return grad.to(logits.dtype).view(logits.shape)


def scaled(logits: Tensor, rows: Rows) -> Tensor:
    """logits / temperature as (N, V), in float32 (float64 stays)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.reshape(-1, logits.shape[-1]).to(dtype)
    if rows.temperatures is not None:
        return x / rows.temperatures.unsqueeze(-1)
    return x if rows.temperature == 1.0 else x / rows.temperature
