"""The logits of K ids per token and the sums over all others, in plain PyTorch. N tokens, V vocabulary, K ids per token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import transforms
from ..op import recorded
from . import events, reference
from .events import Events


class Call(NamedTuple):
    x: Tensor  # (N, V) logits over the temperature
    ids: Tensor  # (N, K), each once in a row; below 0: padding
    with_entropy: bool


def of_scaled(x: Tensor, ids: Tensor, with_entropy: bool) -> Events:
    """The events of logits over the temperature. Its own gradient is exact; transforms of PyTorch follow that of autograd."""
    call = Call(x, ids, with_entropy)
    if transforms.active():
        return _give(call, _forward("", call))
    return Events(*_recorded("", call))


def _forward(backend: str, call: Call) -> tuple[Tensor, Tensor]:
    """The columns of the ids (N, K), NaN for one out of range; M, S', E' of the rest (3, N)."""
    x, ids, with_entropy = call
    outside = (ids < 0) | (ids >= x.shape[-1])
    columns = x.gather(-1, torch.where(outside, 0, ids))
    columns = torch.where(ids >= x.shape[-1], torch.nan, columns)
    return columns, reference.sums(_rest(x, ids), with_entropy)


def _rest(x: Tensor, ids: Tensor) -> Tensor:
    """x, -inf in the columns of the ids."""
    flags = torch.zeros((x.shape[0], x.shape[1] + 1), dtype=torch.bool, device=x.device)
    return torch.where(flags.scatter(-1, _places(x, ids), True)[:, :-1], -torch.inf, x)


def _places(x: Tensor, ids: Tensor) -> Tensor:
    """The column of each id, V where it is in none."""
    return torch.where(ids < 0, x.shape[1], ids.clamp(max=x.shape[1]))


def _gradients(backend: str, inputs: Any, saved: Any, others: Any, grads: Any, needs: Any) -> list[Tensor]:
    (x,), (ids, stats), with_entropy = inputs, saved, others
    of_columns, of_rest, of_entropy = events.gradients_of_sums(grads, ids, 1.0, with_entropy, x.dtype)
    largest, sum_others, spread = stats.unsqueeze(-1).unbind(0)
    # of a rest that is all -inf every term is 0, whatever it is relative to
    shifted = _rest(x, ids) - largest.clamp(min=torch.finfo(x.dtype).min)
    q = shifted.exp() / (1 + sum_others)
    grad = of_rest.unsqueeze(-1) * q
    if of_entropy is not None:
        # d H_R / d x_v = q_v ((M - x_v) - E' / (1 + S'))
        slope = torch.where(q == 0, 0.0, q * (-shifted - spread / (1 + sum_others)))
        grad = grad + of_entropy.unsqueeze(-1) * slope
    grad = F.pad(grad, (0, 1)).scatter(-1, _places(x, ids), of_columns)[:, :-1]
    return [torch.where(events.has_ids(ids).unsqueeze(-1), grad, 0.0)]


def _give(call: Call, results: tuple[Tensor, Tensor]) -> Events:
    return events.of_sums(*results, call.ids, 1.0, call.with_entropy)


_recorded = recorded(
    "token_logprobs",
    _forward,
    differentiable=lambda call: (call.x,),
    save=lambda call, results: ((call.ids, results[1]), call.with_entropy),
    backward=_gradients,
    give=_give,
)
