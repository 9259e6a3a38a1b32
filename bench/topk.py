"""topk_divergence and linear_topk_divergence: inputs, exact results in float64, and whoever computes them.

N tokens, V vocabulary, H hidden, S ids of a teacher for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import logprob
from .cases import Case
from .numerics import Exact
from .peers import COMPILED, EAGER, Call, Inputs, Ours, Peer, compiled

_ROWS_AT_ONCE = 128
_SHARE = 0.9  # that the teacher gives to its ids together


def inputs(case: Case, device: torch.device) -> Inputs:
    """Logits (N, V), or hidden states and a head, and log-probs of S ids of each token, spread over the vocabulary."""
    given = (logprob.linear_inputs if "H" in case.sizes else logprob.token_inputs)(case, device)
    size, vocabulary, tokens = case.sizes["S"], case.sizes["V"], case.sizes["N"]
    steps = torch.arange(size, device=device) * (vocabulary // size)
    generator = torch.Generator(device).manual_seed(1)
    scores = 2 * torch.randn((tokens, size), generator=generator, device=device)
    tensors = {name: value for name, value in given.tensors.items() if name != "targets"}
    tensors["ids"] = (given["targets"].unsqueeze(1) + steps) % vocabulary
    tensors["logp"] = F.log_softmax(scores, -1) + torch.tensor(_SHARE).log()
    upstream = {"divergence": torch.full((tokens,), 1.0 / tokens, device=device)}
    return replace(given, tensors=tensors, upstream=upstream)


def exact(case: Case, inputs: Inputs) -> dict[str, Exact]:
    """Divergence and d logits, or dX of every token and dW of up to CHECKED_COLUMNS rows of the head."""
    linear = "H" in case.sizes
    source = inputs["hidden" if linear else "logits"]
    weight = inputs["weight"].double() if linear else None
    columns = logprob.spread(case.sizes["V"], logprob.CHECKED_COLUMNS, source.device)
    values, slopes = [], []
    d_weight = torch.zeros(len(columns), source.shape[1], dtype=torch.float64, device=source.device)
    for start in range(0, source.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        x = source[rows].double()
        logits = x if weight is None else x @ weight.T
        value, slope = _rows(logits, inputs["ids"][rows], inputs["logp"][rows].double())
        slope = slope * inputs.upstream["divergence"][rows].double().unsqueeze(1)
        values.append(value)
        slopes.append(slope if weight is None else slope @ weight)
        d_weight += slope[:, columns].T @ x if weight is not None else 0.0
    found = {"divergence": Exact(torch.cat(values))}
    if weight is None:
        return found | {"d logits": Exact(torch.cat(slopes))}
    return found | {"d hidden": Exact(torch.cat(slopes)), "d weight": Exact(d_weight, columns)}


def _rows(logits: Tensor, ids: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    """(forward KL with all other ids as one event, its slope in the logits (N, V)) in float64."""
    q = F.log_softmax(logits, -1)
    other = torch.ones_like(q, dtype=torch.bool).scatter(1, ids, False)
    rest = torch.where(other, q, -torch.inf).logsumexp(1, keepdim=True)
    teacher_rest = (-logp.exp().sum(1, keepdim=True)).log1p()
    of_ids = (logp.exp() * (logp - q.gather(1, ids))).sum(1)
    of_rest = (teacher_rest.exp() * (teacher_rest - rest)).squeeze(1)
    slope = torch.where(other, q.exp() * -(teacher_rest - rest).expm1(), 0.0)
    return of_ids + of_rest, slope.scatter(1, ids, q.gather(1, ids).exp() - logp.exp())


def _textbook(logits: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
    """What people write: the rest is 1 - sum, kept away from 0."""
    q = F.log_softmax(logits.float(), -1).gather(-1, ids)
    rest, teacher_rest = ((1 - each.exp().sum(-1)).clamp(min=1e-8) for each in (q, logp))
    of_rest = teacher_rest * (teacher_rest / rest).log()
    return (logp.exp() * (logp - q)).sum(-1) + of_rest


def _linear_textbook(hidden: Tensor, weight: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
    return _textbook(F.linear(hidden, weight), ids, logp)


def _torch(function: Callable[..., Tensor], *names: str) -> Call:
    return lambda inputs: {"divergence": function(*(inputs[name] for name in names))}


_STORED = ("ids", "logp")
OURS_LOGITS = Ours(
    "topk_divergence",
    lambda case, inputs: (tuple(inputs[name] for name in ("logits", *_STORED)), {}),
    lambda found: {"divergence": found},
)
OURS_LINEAR = Ours(
    "linear_topk_divergence",
    lambda case, inputs: (tuple(inputs[name] for name in ("hidden", "weight", *_STORED)), {}),
    lambda found: {"divergence": found},
)
LOGITS = (
    Peer(EAGER, lambda case, inputs: _torch(_textbook, "logits", *_STORED)),
    OURS_LOGITS.peer(),
    Peer(COMPILED, lambda case, inputs: _torch(compiled(_textbook), "logits", *_STORED), compiles=True),
)
LINEAR = (
    Peer(EAGER, lambda case, inputs: _torch(_linear_textbook, "hidden", "weight", *_STORED)),
    OURS_LINEAR.peer(),
    Peer(
        COMPILED,
        lambda case, inputs: _torch(compiled(_linear_textbook), "hidden", "weight", *_STORED),
        compiles=True,
    ),
    Peer("three bare GEMMs", logprob.bare_gemms(recompute=False), kind="floor"),
)
