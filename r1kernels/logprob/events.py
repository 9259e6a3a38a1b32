"""K ids per token and all other ids as one event: the mathematics of K + 1 events, in float64.

N tokens, V vocabulary, K ids per token, each there once. With x = logits / temperature and R the ids of the vocabulary that are not
among the K:

    y = (x_1, ..., x_K, log sum_{v in R} e^x_v)        the logits of the events; p = softmax(y)
    H_R = -sum_{v in R} q_v log q_v,  q_v = e^(x_v - y_rest)
    d y_rest / d x_v = q_v for v in R, 0 for the K ids

The rest is a sum, never 1 - sum, and keeps its digits where the K ids hold nearly everything; in float64 M + log1p(S') loses
none of those that float32 sums have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..op import recorded
from . import reference

# in place of an id: none. A token that has no id is ignored
PADDING = -1


class Asked(NamedTuple):
    """K targets per token."""

    ids: Tensor  # (N, K) each there once, PADDING where there is none
    first: Tensor  # (N, K) where the id of each target stands
    counted: Tensor  # (N, K) bool: not ignored

    @property
    def tokens(self) -> Tensor:
        """(N,) a target that says whether a token counts: 0, or PADDING."""
        return torch.where(self.counted.any(-1), 0, PADDING)

    def values(self, of_ids: Tensor) -> Tensor:
        """Those of the targets (N, K), 0 where ignored, from those of the ids."""
        return torch.where(self.counted, of_ids.gather(-1, self.first), 0.0)


class Events(NamedTuple):
    logits: Tensor  # y (N, K + 1) float64; -inf for padding; an ignored token has a rest alone
    rest_entropy: Tensor  # H_R (N,) float64, or (0,)


def asked_of(targets: Tensor, ignore_index: int, vocabulary: int) -> Asked:
    """Of targets (..., K). One out of range becomes ``vocabulary``: an error of cpu kernels, NaN in its row on a GPU."""
    flat = targets.reshape(-1, targets.shape[-1])
    counted = flat != ignore_index
    ids = torch.where(counted, torch.where(flat < 0, vocabulary, flat), PADDING)
    return Asked(*distinct(ids), counted)


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids (N, K) with PADDING where one is there again, the place (N, K) where the id of each entry stands first)."""
    ordered, order = torch.sort(ids, dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    places = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    start = torch.where(again, 0, places).cummax(-1).values
    first = torch.empty_like(order).scatter(-1, order, order.gather(-1, start))
    return torch.where(first == places, ids, PADDING), first


def divisor_of(rows: Any) -> Tensor | float:
    """What divides the logits of some tokens: their ``temperatures`` (N,) in float64, or the ``temperature`` of all."""
    return rows.temperature if rows.temperatures is None else rows.temperatures.double()


def of_sums(
    columns: Tensor, stats: Tensor, ids: Tensor, divisor: Tensor | float, with_entropy: bool
) -> Events:
    """From the logits (N, K) of the ids and M, S', E' (3, N) of the rest, all of it before the division by temperatures (N,)."""
    largest, others, spread = torch.where(has_ids(ids), stats.double(), 0.0).unbind(0)
    x = torch.where(ids < 0, -torch.inf, columns.double() / _of_row(divisor))
    log_others = others.log1p()
    entropy = log_others + spread / (1 + others) if with_entropy else log_others.new_empty(0)
    return Events(torch.cat((x, (largest / divisor + log_others).unsqueeze(-1)), -1), entropy)


def gradients_of_sums(
    grads: Any, ids: Tensor, divisor: Tensor | float, with_entropy: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of the logits (N, K), of y_rest (N,) and of H_R (N,) or None, from those of ``Events``."""
    of_logits, of_entropy = grads
    if of_logits is None:
        of_logits = torch.zeros((ids.shape[0], ids.shape[1] + 1), dtype=torch.float64, device=ids.device)
    of_columns = (of_logits[:, :-1] / _of_row(divisor)).to(dtype)
    of_entropy = of_entropy.to(dtype) if with_entropy and of_entropy is not None else None
    return of_columns, of_logits[:, -1].to(dtype), of_entropy


def has_ids(ids: Tensor) -> Tensor:
    """Which tokens (N,) count."""
    return (ids >= 0).any(-1)


def logprobs(events: Events, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log-probs (N, K), the entropy (N,) of the whole vocabulary or (0,), 0 for an ignored token) in ``dtype``."""
    logp, entropy = log_probs(events)
    return logp[:, :-1].to(dtype), entropy.to(dtype)


def log_probs(events: Events) -> tuple[Tensor, Tensor]:
    """log softmax(y) (N, K + 1), and the entropy of the whole vocabulary (N,) or (0,); its own gradient is exact."""
    return (_log_probs if transforms.active() else _recorded)("", events)


def _log_probs(backend: str, events: Events) -> tuple[Tensor, Tensor]:
    y, rest_entropy = events
    with_entropy = rest_entropy.numel() > 0
    largest, others, spread = reference.sums(y, with_entropy)
    log_normaliser = torch.where(largest == -torch.inf, torch.nan, others).log1p()
    logp = (y - largest.unsqueeze(-1)) - log_normaliser.unsqueeze(-1)
    if not with_entropy:
        return logp, rest_entropy
    # that of the events, and that within the rest
    share = logp[:, -1].exp()
    within = torch.where(share == 0, 0.0, share * rest_entropy)
    return logp, log_normaliser + spread / (1 + others) + within


def _gradients(
    backend: str, inputs: Any, saved: Any, others: Any, grads: Any, needs: Any
) -> list[Tensor | None]:
    (_, rest_entropy), (logp, entropy), (of_logp, of_entropy) = inputs, saved, grads
    probs = logp.exp()
    grad, of_rest = torch.zeros_like(logp), None
    if of_logp is not None:
        # d logp_e / d y_f = 1[e = f] - p_f, and 1 - p_e = -expm1(logp_e)
        total = of_logp.sum(-1, keepdim=True)
        grad = -of_logp * logp.expm1() - probs * (total - of_logp)
    if of_entropy is not None and rest_entropy.numel():
        # d H / d y_e = p_e (-log p_e - H), of the rest p (-log p + H_R - H); d H / d H_R = p_rest
        surprise = torch.cat((-logp[:, :-1], (rest_entropy - logp[:, -1]).unsqueeze(-1)), -1)
        slope = torch.where(probs == 0, 0.0, probs * (surprise - entropy.unsqueeze(-1)))
        grad = grad + of_entropy.unsqueeze(-1) * slope
        of_rest = of_entropy * probs[:, -1]
    return [grad, of_rest]


_recorded = recorded(
    "token_logprobs",
    _log_probs,
    differentiable=lambda events: tuple(events),
    save=lambda events, results: (results, None),
    backward=_gradients,
)


def _of_row(divisor: Tensor | float) -> Tensor | float:
    return divisor.unsqueeze(-1) if isinstance(divisor, Tensor) else divisor
