"""linear_divergence in plain PyTorch, chunk by chunk over the tokens: the oracle. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast, transforms
from ..op import recorded
from . import linear_reference, reference, sharded
from .arguments import Head
from .divergence_terms import KINDS, Mean, log_ratios, mean_ratio, slopes, terms
from .token import Rows

if TYPE_CHECKING:
    from .divergence import DivergenceCall


def run(call: DivergenceCall) -> tuple[Tensor, Tensor]:
    """(divergence (N,), entropy of the student (N,) or (0,), which has no gradient)"""
    tokens, vocabulary = call.hidden.shape[0], call.weight.shape[0]
    # float32 (float64 stays), once for all chunks
    dtype = torch.float64 if call.hidden.dtype == torch.float64 else torch.float32
    _, teacher_weight, of_teacher = call.teacher
    bias, teacher_bias = (
        None if x is None else x.to(dtype) for x in (call.rows.bias, of_teacher.teacher_bias)
    )
    with autocast.off(call.hidden):
        hidden = (
            call.hidden if call.shard is None else sharded.copy_to_group(call.hidden.to(dtype), call.shard)
        )
        call = call._replace(
            hidden=hidden,
            weight=call.weight.to(dtype),
            rows=call.rows._replace(bias=bias),
            teacher=call.teacher._replace(
                teacher_weight=teacher_weight.to(dtype),
                teacher_rows=of_teacher._replace(teacher_bias=teacher_bias),
            ),
        )
        pieces = linear_reference.pieces(call.chunk_size, tokens, vocabulary)
        keep = linear_reference.keeps(call.save_logits, tokens, vocabulary)
        divergence, entropy = linear_reference.joined(_chunk, [_part(call, piece) for piece in pieces], keep)
    return divergence, entropy


def _part(call: DivergenceCall, piece: slice) -> DivergenceCall:
    """The call of some tokens."""

    def some(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[piece]

    rows, teacher = call.rows, call.teacher
    return call._replace(
        hidden=call.hidden[piece],
        rows=rows._replace(targets=rows.targets[piece], temperatures=some(rows.temperatures)),
        teacher=teacher._replace(
            teacher_hidden=teacher.teacher_hidden[piece],
            teacher_rows=teacher.teacher_rows._replace(
                teacher_temperatures=some(teacher.teacher_rows.teacher_temperatures)
            ),
        ),
    )


def _chunk(call: DivergenceCall) -> tuple[Tensor, Tensor]:
    ignored = call.rows.targets == call.rows.ignore_index
    x = _scaled_logits(call.hidden, call.weight, call.rows, ignored)
    with torch.no_grad():
        hidden, weight, of_teacher = call.teacher
        teacher = _scaled_logits(hidden, weight, of_teacher.beside(call.rows), ignored)
    divergence, entropy = divergence_of_logits(
        x, teacher, KINDS[call.kind], call.beta, call.with_entropy, call.shard
    )
    entropy = entropy.masked_fill(ignored, 0.0) if call.with_entropy else entropy
    return divergence.masked_fill(ignored, 0.0), entropy


def _scaled_logits(hidden: Tensor, weight: Tensor, rows: Rows, ignored: Tensor) -> Tensor:
    """The logits (N, V) over the temperature, in the dtype of the weight; 0 times NaN would reach the head."""
    hidden = hidden.to(weight.dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    logits = linear_reference.head_logits(hidden, Head(weight, rows.bias, rows.softcap, rows.logit_scale))
    return reference.scaled(logits, rows)


class LogitsCall(NamedTuple):
    """Scaled logits (N, V) of both; of a shard, this rank's columns."""

    student: Tensor
    teacher: Tensor
    kind: str
    beta: float
    with_entropy: bool
    shard: sharded.Shard | None


def divergence_of_logits(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    beta: float,
    with_entropy: bool,
    shard: sharded.Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """(divergence (N,), entropy (N,) or (0,)) of scaled logits; its own gradient is exact, transforms take that of autograd."""
    call = LogitsCall(student, teacher, kind, beta, with_entropy, shard)
    divergence, entropy = _forward("", call) if transforms.active() else _recorded("", call)
    return divergence, entropy


def log_probs(x: Tensor, shard: sharded.Shard | None = None) -> Tensor:
    """log softmax of scaled logits (N, V), without cancellation where one leads; NaN where all are -inf."""
    largest, others, _ = _stats(x, False, shard).unsqueeze(-1).unbind(0)
    return x - largest - torch.where(largest == -torch.inf, torch.nan, others).log1p()


def _stats(x: Tensor, with_entropy: bool, shard: sharded.Shard | None) -> Tensor:
    """M, S', E' (3, N) of the whole vocabulary."""
    stats = reference.sums(x, with_entropy)
    if shard is None:
        return stats
    targets = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    rows = Rows(None, 1.0, 0.0, targets, None, 1.0, -100, shard.first, shard.vocabulary)
    return sharded.merged_stats(stats, shard, rows)


def _forward(backend: str, call: LogitsCall) -> tuple[Tensor, Tensor]:
    student, teacher, kind, beta, with_entropy, shard = call
    divergence = terms(log_probs(student, shard), log_probs(teacher, shard), kind, beta).sum(-1)
    if shard is not None:
        divergence = sharded.sum_over_ranks_(divergence, shard)
    if not with_entropy:
        return divergence, divergence.new_empty(0)
    with torch.no_grad():
        _, others, spread = _stats(student, True, shard)
        return divergence, others.log1p() + spread / (1 + others)


def _gradients(backend: str, inputs: Any, tensors: Any, others: Any, grads: Any, needs: Any) -> list[Tensor]:
    kind, beta, shard = others
    student, teacher = (log_probs(x, shard) for x in (*inputs, *tensors))
    if shard is None or kind == "forward_kl":
        mean = mean_ratio(student, teacher, kind, beta)
    else:
        mean = _mean_of_ranks(student, teacher, kind, beta, shard)
    return [grads[0].unsqueeze(-1) * slopes(student, teacher, kind, beta, mean)]


def _mean_of_ranks(student: Tensor, teacher: Tensor, kind: str, beta: float, shard: sharded.Shard) -> Mean:
    """``mean_ratio`` of all ranks; ids as likely as the likeliest are taken together."""
    ratios = log_ratios(student, teacher, kind, beta)
    leads = student == sharded.max_over_ranks_(student.amax(-1, keepdim=True), shard)
    those = torch.stack((torch.where(leads, ratios, 0.0), leads.to(ratios.dtype))).sum(-1, keepdim=True)
    total, count = sharded.sum_over_ranks_(those, shard)
    at_largest, probs = total / count, student.exp()
    weighted = torch.where(probs == 0, 0.0, probs * (ratios - at_largest)).sum(-1, keepdim=True)
    return Mean(at_largest, sharded.sum_over_ranks_(weighted, shard))


_recorded = recorded(
    "linear_divergence",
    _forward,
    differentiable=lambda call: (call.student,),
    save=lambda call, results: ((call.teacher,), (call.kind, call.beta, call.shard)),
    backward=_gradients,
    constant=(1,),
)
