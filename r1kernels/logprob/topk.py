"""topk_divergence, linear_topk_divergence: a student against a teacher of which K log-probs a token are stored.

N tokens, H hidden, V vocabulary, K ids per token. With p_T, p_S the probabilities of the K ids, r_T and r_S those of all others
together, the K ids and the rest are K + 1 events (events.py), whose divergence is at most that over the whole vocabulary:

    D = KL(p_T, r_T | p_S, r_S)           d D / d x_v = p_S - p_T for the K ids, p_S (1 - r_T / r_S) for others
    D = KL(p_S, r_S | p_T, r_T)           d D / d x_v = p_S (log p_S - log p_T - D), p_S (log r_S - log r_T - D)

and so for the Jensen-Shannon divergence. r_S is a sum over the other ids; r_T = 1 - sum p_T, at least 2^-24: what was stored in
float32 may sum to 1 and a little more, and then the teacher's probabilities are divided by their sum.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..op import Op
from . import columns, columns_head, events, linear, linear_reference
from .arguments import check_kind, check_linear, check_logits, in_rows, split_temperature
from .completions import EACH_TOKEN
from .divergence_reference import divergence_of_logits
from .events import PADDING
from .token import Rows, plain_rows

TAILS = ("bucket", "ignore")
# r_T where less is left: a rounding of float32
LEAST_REST = 2.0**-24
# and where the student has nothing left, so much of it may come from the rounding of what was stored in 16 bits
ROUNDED_REST = 2.0**-10


def topk_divergence(
    logits: Tensor,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Divergence of a student from a teacher of which K log-probs a token are stored.

    .. math::
        forward\_kl = \sum_e p_T \log (p_T / p_S), \qquad reverse\_kl = \sum_e p_S \log (p_S / p_T)

        jsd = \beta\, KL(p_T | m) + (1 - \beta)\, KL(p_S | m), \qquad m = \beta p_T + (1 - \beta) p_S

    over the K ids and, with ``tail="bucket"``, all other ids as one more event; p_S = softmax(logits / temperature).

    Args:
        logits: (..., V) of the student, float32, bfloat16, float16 or float64, any strides.
        teacher_ids: (..., K), int64 or int32, in [0, V), each once for a token; below 0: padding. A token of padding alone gives 0
            and a zero gradient row, whatever its logits hold.
        teacher_logp: (..., K), the teacher's log-probs of these ids over the whole vocabulary; no gradient. Under padding they may
            be anything.
        kind: "forward_kl", "reverse_kl" or "jsd". beta: of "jsd", the teacher's share of the mixture, inside (0, 1).
        tail: "bucket": what the ids leave of either distribution is one event; the result is at least 0 and at most the divergence
            over the whole vocabulary. "ignore": a sum over the K ids alone, which is no divergence: it can be negative.
        temperature: of the student: a number above 0 or a tensor, () or one per token (...); no gradient. What is stored is taken as
            it is.
        backend: forces one (see r1kernels.backends); None chooses.

    Returns:
        (...), float32, float64 for float64 logits, in nats. The gradient comes in the dtype of the logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, an id that a token has twice, a log-prob above 0,
        or a number out of its range. IndexError: an id of V or above. (Of values: on the CPU; on CUDA the row becomes NaN unless
        ``debug_checks(True)``.)

    Precision: the student's rest is a sum over the other ids, never 1 - sum; sums over the vocabulary in float32 as in
    ``token_logprobs``, over the K + 1 events in float64: exact where logits lead by 30 nats and where the two agree. The teacher's
    rest is at least 2^-24. Deterministic.
    """
    check_logits(logits)
    how = _check_how(kind, beta, tail)
    ids = _check_ids(teacher_ids, logits)
    tokens = _tokens(ids)
    temperatures, scalar = split_temperature(temperature, tokens, PADDING, logits.dtype)
    rows = plain_rows(logits, tokens.reshape(-1), temperatures, scalar, PADDING)
    teacher = _check_teacher(ids, teacher_logp, logits.shape[-1])
    return TOPK_DIVERGENCE(backend, TopkCall(in_rows(logits), rows, teacher, how)).view(tokens.shape)


def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logp: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    save_logits: bool | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""``topk_divergence`` of the logits c tanh(s (hidden weight^T + bias) / c), without all of them at once.

    hidden (..., H), weight (V, H), bias (V,) or None, of one dtype, and the options ``softcap`` (c), ``logit_scale`` (s), ``chunk_size``,
    ``save_logits`` and ``group`` are those of ``linear_logprobs``; the others those of ``topk_divergence``. Hidden states of a token of
    padding alone may hold anything. Gradients go to hidden, weight and bias, in their dtypes.

    Returns, raises and precision as there; products as in ``linear_logprobs``.
    """
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
    how = _check_how(kind, beta, tail)
    ids = _check_ids(teacher_ids, hidden)
    tokens = _tokens(ids)
    hidden, head = check_linear(hidden, weight, tokens, bias, softcap, logit_scale)
    source = linear.call_of(
        hidden,
        head,
        tokens,
        EACH_TOKEN,
        temperature=temperature,
        ignore_index=PADDING,
        chunk_size=chunk_size,
        save_logits=save_logits,
        group=group,
    )
    teacher = _check_teacher(ids, teacher_logp, source.rows.vocabulary)
    source = source._replace(ids=teacher.ids)
    return LINEAR_TOPK_DIVERGENCE(backend, LinearTopkCall(hidden, source, teacher, how)).view(tokens.shape)


class Teacher(NamedTuple):
    ids: Tensor  # (N, K) int64, each once in a row; below 0: padding
    logp: Tensor  # (N, K) float64, -inf for padding; NaN for an id that was there twice


class How(NamedTuple):
    kind: str
    beta: float
    tail: str


class TopkCall(NamedTuple):
    logits: Tensor  # (B, T, V), any strides
    rows: Rows  # the whole vocabulary, without bias, scale and cap
    teacher: Teacher
    how: How


class LinearTopkCall(NamedTuple):
    hidden: Tensor
    source: linear.LinearCall
    teacher: Teacher
    how: How


def _check_how(kind: str, beta: float, tail: str) -> How:
    return How(kind, check_kind(kind, beta), checks.choice("tail", tail, TAILS))


def _check_ids(ids: Tensor, of: Tensor) -> Tensor:
    """The teacher's ids (..., K) of logits or hidden states (..., V or H), int64."""
    checks.tensor(
        "teacher_ids", ids, dtypes=(torch.int64, torch.int32), shape=(*of.shape[:-1], None), like=of
    )
    if ids.shape[-1] == 0:
        raise ValueError(f"teacher_ids: expected shape (..., K) with K >= 1, got {tuple(ids.shape)}")
    return ids.long()


def _tokens(ids: Tensor) -> Tensor:
    """(...) 0, or PADDING for a token that has no id."""
    return torch.where(events.has_ids(ids), 0, PADDING)


def _check_teacher(ids: Tensor, logp: Tensor, vocabulary: int) -> Teacher:
    checks.tensor("teacher_logp", logp, dtypes=checks.FLOATS, shape=ids.shape, like=ids)
    if logp.requires_grad:
        raise ValueError("teacher_logp: expected a tensor without gradient, got one that requires it")
    flat = ids.reshape(-1, ids.shape[-1])
    # padding has marks of its own, so that it is not there twice
    marks = -1 - torch.arange(ids.shape[-1], device=ids.device)
    once, _ = events.distinct(torch.where(flat < 0, marks, flat))
    again = (once < 0) & (flat >= 0)
    if checks.values_visible(ids, logp):
        checks.in_range("teacher_ids", ids.clamp(min=0), 0, vocabulary)
        _no(again.view(ids.shape), ids, "teacher_ids: expected every id once for a token")
        # as large as the rounding of a log-prob in 16 bits
        above = (ids >= 0) & (logp > 1e-2)
        _no(above, logp, "teacher_logp: expected log-probs, at most 0")
    log_teacher = torch.where(flat < 0, -torch.inf, logp.reshape(flat.shape).double())
    return Teacher(torch.where(again, PADDING, flat), log_teacher.masked_fill(again, torch.nan))


def _no(bad: Tensor, values: Tensor, text: str) -> None:
    if bool(bad.any()):
        place = checks.first_bad(bad)
        raise ValueError(
            f"{text}, got {values[place].item()} at position {place if len(place) > 1 else place[0]}"
        )


def _divergence(
    found: events.Events, teacher: Teacher, how: How, vocabulary: int, dtype: torch.dtype
) -> Tensor:
    """(N,) of the events of the student."""
    if how.tail == "ignore":
        return _of_ids_alone(found, teacher, how).to(dtype)
    rest = _rest(teacher.logp)
    # ids that are all that there is, or all that is possible, leave nothing to either
    every = (teacher.ids >= 0).sum(-1) == vocabulary
    nothing = every | (found.logits[:, -1] == -torch.inf) & (rest <= ROUNDED_REST)
    log_rest = rest.clamp(min=LEAST_REST).log().masked_fill(nothing, -torch.inf)
    log_teacher = torch.cat((teacher.logp, log_rest.unsqueeze(-1)), -1)
    divergence, _ = divergence_of_logits(found.logits, log_teacher, how.kind, how.beta, False)
    return divergence.to(dtype)


def _rest(logp: Tensor) -> Tensor:
    """1 - sum p (N,), of which 1 - p of the largest is exact."""
    largest, place = logp.max(-1, keepdim=True)
    return -largest.squeeze(-1).expm1() - logp.exp().scatter(-1, place, 0.0).sum(-1)


def _of_ids_alone(found: events.Events, teacher: Teacher, how: How) -> Tensor:
    least = torch.finfo(torch.float64).min / 4  # e^ of it is 0, and 0 times it is 0
    of_student = events.log_probs(found)[0][:, :-1]
    student, log_teacher = of_student.clamp(min=least), teacher.logp.clamp(min=least)
    if how.kind == "forward_kl":
        values = log_teacher.exp() * (log_teacher - student)
        infinite = (of_student == -torch.inf) & (log_teacher.exp() > 0)
    elif how.kind == "reverse_kl":
        values = student.exp() * (student - log_teacher)
        infinite = (teacher.logp == -torch.inf) & (student.exp() > 0)
    else:
        log_mean = torch.logaddexp(log_teacher + math.log(how.beta), student + math.log1p(-how.beta))
        values = how.beta * log_teacher.exp() * (log_teacher - log_mean)
        values = values + (1 - how.beta) * student.exp() * (student - log_mean)
        infinite = torch.zeros_like(values, dtype=torch.bool)
    values = values + torch.where(infinite, torch.inf, 0.0)
    return torch.where(teacher.logp == -torch.inf, torch.where(teacher.ids < 0, 0.0, values), values).sum(-1)


def _of_logits(backend: str, call: TopkCall) -> Tensor:
    dtype = torch.float64 if call.logits.dtype == torch.float64 else torch.float32
    found = columns.of_logits(backend, call.logits, call.rows, call.teacher.ids, False)
    return _divergence(found, call.teacher, call.how, call.rows.vocabulary, dtype)


def _of_hidden(backend: str, call: LinearTopkCall) -> Tensor:
    if backend == "reference":
        found = linear_reference.events_of(call.source)
    else:
        found = columns_head.of_hidden(backend, linear.decided(call.source))
    dtype = torch.float64 if call.hidden.dtype == torch.float64 else torch.float32
    return _divergence(found, call.teacher, call.how, call.source.rows.vocabulary, dtype)


TOPK_DIVERGENCE = Op("topk_divergence", partial(_of_logits, "reference"), _of_logits, decides="logits")
LINEAR_TOPK_DIVERGENCE = Op(
    "linear_topk_divergence", partial(_of_hidden, "reference"), _of_hidden, decides="hidden"
)
