"""linear_divergence: how far a student's distribution is from a teacher's, from the hidden states and heads of both.

Shapes: N tokens, H hidden (the teacher may have another), V vocabulary that both have.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import autocast, checks, devices
from ..op import OUTSIDE, Contiguous, Kernel, Op, Size, recorded
from . import divergence_reference, linear, parts, sharded
from .arguments import Head, check_kind, check_linear, check_memory, split_temperature
from .divergence_rows import TeacherRows, finish
from .divergence_terms import KINDS
from .head import gradient_shapes, needs_of, rows_of, saves
from .linear import LinearCall
from .token import Rows

IGNORED = -100  # of the targets inside a call, which are 0 elsewhere


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    targets: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    save_logits: bool | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Divergence of the student's and the teacher's distribution of each token over the whole vocabulary, for distillation.

    .. math::
        forward\_kl = \sum_v p_T \log (p_T / p_S), \qquad reverse\_kl = \sum_v p_S \log (p_S / p_T)

        jsd = \beta\, KL(p_T | m) + (1 - \beta)\, KL(p_S | m), \qquad m = \beta p_T + (1 - \beta) p_S

    with p_S = softmax(c tanh(s (hidden weight^T + bias) / c) / temperature), s = ``logit_scale`` and c = ``softcap`` (None: no
    cap), and p_T the same of the teacher. Neither model's (N, V) logits are held at once, but where their gradient is kept.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64; under autocast cast as ``F.linear`` would.
        weight: (V, H), of the same dtype. bias: (V,) or None.
        teacher_hidden, teacher_weight, teacher_bias: (..., H'), (V', H'), (V',), of one dtype; no gradient. Where V and V' differ,
            which is padding, both distributions are those of the first min(V, V') ids, renormalised.
        kind: "forward_kl", "reverse_kl" or "jsd". beta: of "jsd", the teacher's share of the mixture, inside (0, 1).
        temperature: a number above 0 or a tensor, () or one per token (...); no gradient. teacher_temperature: None: the same.
        softcap, logit_scale, teacher_softcap, teacher_logit_scale: numbers of either head.
        targets: (...), int64, or None. Tokens whose target is ``ignore_index`` give 0 and take no part in any gradient, whatever
            their hidden states hold; other values are not looked at.
        return_entropy: also return the student's entropy, in nats, without a gradient.
        chunk_size: tokens per chunk; None chooses from V and a memory budget.
        save_logits: keep the (N, V) gradient of the student's logits for the backward (True, faster) or recompute it (False, less
            memory); None chooses by a memory budget, as ``linear_logprobs`` does. Where hidden alone needs a gradient, kernels do
            neither: the forward works out d divergence / d hidden too.
        group: a process group over which the vocabulary is sharded: weights and biases of both are this rank's rows, the same ids
            of either, in rank order; everything else is the same on every rank, and so are the results and the gradient of
            ``hidden``. Both logits are then computed once more in the forward. Every call waits once for the sizes of the shards.

    Returns:
        divergence (...), or (divergence, entropy): float32, float64 where hidden is, in nats. Gradients of hidden, weight and bias
        come in the dtype of each input.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a number out of its range.

    Precision: float32 logits, also from 16-bit inputs; a sum of terms none of which is negative or cancels
    (``divergence_terms.py``): exact where logits lead by 30 nats, and 0 where teacher and student agree. An id that one of the two
    has at -inf has probability 0 there; it makes a KL infinite where only the reference distribution has it so. Deterministic.
    float64 is served by the reference alone.
    """
    beta = check_kind(kind, beta)
    ignore_index = checks.integer("ignore_index", ignore_index)
    checks.boolean("return_entropy", return_entropy)
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
    shape = hidden.shape[:-1]
    checks.tensor("teacher_hidden", teacher_hidden, shape=(*shape, None), like=hidden)
    if targets is None:
        targets = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
        ignore_index = IGNORED
    hidden, head = check_linear(hidden, weight, targets, bias, softcap, logit_scale)
    teacher_hidden, teacher_head = check_linear(
        teacher_hidden,
        teacher_weight,
        targets,
        teacher_bias,
        teacher_softcap,
        teacher_logit_scale,
        whose="teacher_",
    )
    temperatures, number = split_temperature(temperature, targets, ignore_index, hidden.dtype)
    of_teacher = temperatures, number
    if teacher_temperature is not None:
        name = "teacher_temperature"
        of_teacher = split_temperature(teacher_temperature, targets, ignore_index, hidden.dtype, name)
    vocabulary = min(head.weight.shape[0], teacher_head.weight.shape[0])
    shard = None
    if group is not None:
        if head.weight.shape[0] != teacher_head.weight.shape[0]:
            raise ValueError(
                f"teacher_weight: expected the {head.weight.shape[0]} rows that weight has on this rank of group, "
                f"got {teacher_head.weight.shape[0]}"
            )
        shard = sharded.shard_of(head.weight, group)
    head, teacher_head = _some(head, vocabulary), _some(teacher_head, vocabulary)
    counted = torch.where(targets == ignore_index, IGNORED, 0)
    rows = rows_of(head, counted, temperatures, number, IGNORED, shard)
    bias = None if teacher_head.bias is None else teacher_head.bias.detach()
    teacher = Teacher(
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_head.weight.detach(),
        TeacherRows(bias, teacher_head.logit_scale, teacher_head.softcap or 0.0, *of_teacher),
    )
    call = DivergenceCall(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        rows,
        teacher,
        KINDS.index(kind),
        beta,
        return_entropy,
        check_memory(chunk_size, save_logits),
        save_logits,
        shard=shard,
    )
    divergence, entropy = LINEAR_DIVERGENCE(backend, call)
    divergence = divergence.view(shape)
    return (divergence, entropy.view(shape)) if return_entropy else divergence


def _some(head: Head, ids: int) -> Head:
    """The head of the first ``ids`` of the vocabulary."""
    if ids == head.weight.shape[0]:
        return head  # the gradient of a slice is a copy, also of a slice of all
    bias = None if head.bias is None else head.bias[:ids]
    return head._replace(weight=head.weight[:ids], bias=bias)


class Teacher(NamedTuple):
    """The other distribution of a call; without a gradient."""

    teacher_hidden: Tensor  # (N, H')
    teacher_weight: Tensor  # (V, H'), of the same dtype
    teacher_rows: TeacherRows


class DivergenceCall(NamedTuple):
    """Results: divergence (N,), and the student's entropy (N,), or (0,) where it is not wanted, without a gradient."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), of the same dtype
    rows: Rows  # for N tokens and V columns
    teacher: Teacher
    kind: int  # its place in KINDS
    beta: float
    with_entropy: bool
    chunk_size: Size  # tokens of a chunk; 0: chosen
    save_logits: bool | None  # the slopes of the logits, (N, V), for the backward; None: ``on_kernels`` says
    frozen: bool = False  # save the slope of the hidden states, (N, H), which alone need a gradient
    shard: Annotated[sharded.Shard | None, OUTSIDE] = None


class DivergenceSumsCall(NamedTuple):
    """Of a slab, some columns of the vocabulary, where the sums of whole rows are known."""

    hidden: Tensor
    weight: Tensor
    rows: Rows
    teacher: Teacher
    kind: int
    beta: float
    chunk_size: Size
    stats: Tensor
    teacher_stats: Tensor


class DivergenceBackwardCall(NamedTuple):
    hidden: Tensor
    weight: Tensor
    rows: Rows
    teacher: Teacher
    kind: int
    beta: float
    chunk_size: Size
    stats: Tensor  # what follows: as the forward gives it
    teacher_stats: Tensor
    mean: Tensor
    slope: Tensor | None
    grad: Contiguous  # (N,) float32
    need_hidden: bool
    need_weight: bool
    need_bias: bool


def slope_shape(call: DivergenceCall) -> tuple[int, ...]:
    if call.save_logits:
        return (call.hidden.shape[0], call.weight.shape[0])
    return tuple(call.hidden.shape) if call.frozen else (0,)


def _shapes(call: DivergenceCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """divergence (N,), entropy (N,) or (0,), the sums of both (3, N) and the mean of log-ratios (2, N), as in divergence_rows.py,
    and d divergence / d raw logits (N, V) or d divergence / d hidden (N, H), else (0,); all float32."""
    hidden, tokens = call.hidden, call.hidden.shape[0]
    shapes = (
        tokens,
        tokens if call.with_entropy else 0,
        (3, tokens),
        (3, tokens),
        (2, tokens),
        slope_shape(call),
    )
    value, entropy, stats, teacher_stats, mean, slope = (
        hidden.new_empty(shape, dtype=torch.float32) for shape in shapes
    )
    return value, entropy, stats, teacher_stats, mean, slope


def _sums_shapes(call: DivergenceSumsCall) -> Tensor:
    """What these columns add to the sums (4, N) of divergence_rows.py."""
    return call.hidden.new_empty((4, call.hidden.shape[0]), dtype=torch.float32)


FORWARD = Kernel("linear_divergence", DivergenceCall, _shapes)
SUMS = Kernel("linear_divergence", DivergenceSumsCall, _sums_shapes, suffix="_sums")
BACKWARD = Kernel("linear_divergence", DivergenceBackwardCall, gradient_shapes, suffix="_backward")


def _forward(backend: str, call: DivergenceCall) -> tuple[Tensor, ...]:
    if call.shard is not None:
        return _of_shard(backend, call, call.shard)
    results: tuple[Tensor, ...] = FORWARD(backend, call)
    return results


def _of_shard(backend: str, call: DivergenceCall, shard: sharded.Shard) -> tuple[Tensor, ...]:
    """What FORWARD gives, of the whole vocabulary: the sums of either model's rows, then what the ids add."""
    hidden, weight, rows, teacher, kind, beta, with_entropy, chunk_size, *_ = call

    def merged(of_call: LinearCall) -> tuple[Tensor, Tensor]:
        chosen, _, stats, extra, _ = linear.FORWARD(backend, of_call)
        part = parts.Part(chosen, stats, extra)
        _, entropy, stats, _ = sharded.merge(part, shard, of_call.rows, of_call.with_entropy)
        return entropy, stats

    other, head, of_teacher = teacher
    options = (False, chunk_size, False, False)
    entropy, stats = merged(LinearCall(hidden, weight, rows, with_entropy, *options))
    _, teacher_stats = merged(LinearCall(other, head, of_teacher.beside(rows), False, *options))
    slab = DivergenceSumsCall(hidden, weight, rows, teacher, kind, beta, chunk_size, stats, teacher_stats)
    sums = sharded.sum_over_ranks_(SUMS(backend, slab), shard)
    divergence, mean = finish(sums, stats)
    return divergence, entropy, stats, teacher_stats, mean, divergence.new_empty(0)


def _save(call: DivergenceCall, results: tuple[Tensor, ...]) -> Any:
    _, _, stats, teacher_stats, mean, slope = results
    if call.frozen:
        return (slope,), None
    (_, *of_rows), numbers = call.rows.apart()
    hidden, weight, (bias, logit_scale, softcap, temperatures, temperature) = call.teacher
    tensors = (*of_rows, hidden, weight, bias, temperatures, stats, teacher_stats, mean)
    of_teacher = (logit_scale, softcap, temperature)
    others = (numbers, of_teacher, call.kind, call.beta, call.chunk_size, call.shard)
    return (*tensors, slope if call.save_logits else None), others


def _gradients(backend: str, inputs: Any, tensors: Any, others: Any, grads: Any, needs: Any) -> Any:
    if others is None:
        (slope,) = tensors
        return slope * grads[0].unsqueeze(1), None, None
    hidden, weight, bias = inputs
    numbers, (logit_scale, softcap, temperature), kind, beta, chunk_size, shard = others
    targets, temperatures, x, w, b, of_tokens, stats, teacher_stats, mean, slope = tensors
    rows = Rows.together((bias, targets, temperatures), numbers)
    teacher = Teacher(x, w, TeacherRows(b, logit_scale, softcap, of_tokens, temperature))
    sums = stats, teacher_stats, mean, slope
    call = (hidden, weight, rows, teacher, kind, beta, chunk_size, *sums, grads[0], *needs)
    for_hidden, for_weight, for_bias = BACKWARD(backend, DivergenceBackwardCall(*call))
    if shard is not None and needs[0]:
        for_hidden = sharded.sum_over_ranks_(for_hidden, shard)
    return for_hidden, for_weight, for_bias


_recorded = recorded(
    "linear_divergence",
    _forward,
    differentiable=lambda call: (call.hidden, call.weight, call.rows.bias),
    save=_save,
    backward=_gradients,
    give=lambda call, results: results[:2],
    constant=(1,),
)


def on_kernels(backend: str, call: DivergenceCall) -> tuple[Tensor, Tensor]:
    differentiable, trained = needs_of(call)
    alone = differentiable and call.shard is None
    save_logits = saves(call, call.save_logits) and alone and trained
    with autocast.off(call.hidden):
        decided = call._replace(save_logits=save_logits, frozen=alone and not trained)
        found: tuple[Tensor, Tensor] = _recorded(backend, decided)
    return found


def limits(backend: str, call: DivergenceCall) -> tuple[str, ...]:
    if call.teacher.teacher_hidden.dtype in devices.FLOATS:
        return ()
    return (f"teacher_hidden: {call.teacher.teacher_hidden.dtype}, which the reference alone serves",)


LINEAR_DIVERGENCE = Op(
    "linear_divergence", divergence_reference.run, on_kernels, decides="hidden", limits=limits
)
