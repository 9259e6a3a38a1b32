"""linear_grpo_loss: from hidden states and the output head to the GRPO loss, without keeping the logits.

N tokens, H hidden, V vocabulary. The two ops in a row, or one pass over the logits where the slope of a token is known from
the token: 6 N V H instead of 8, and the gradients are kept in place of the logits (one_pass.py).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast, checks
from ..logprob import linear_logprobs
from ..logprob.arguments import Head, check_linear, check_memory, check_temperature
from ..logprob.head import rows_of
from ..logprob.kept import Kept, check_kept
from ..logprob.sharded import shard_of
from ..logprob.token import Rows
from ..op import Kernel, Op, Size, recorded
from . import loss
from .layout import advantages_of, layout_of
from .loss import GRPO_LOSS, KernelCall, LossCall, Tokens
from .metrics import NAMES, GRPOOutput, Metrics, measured_names
from .objective import Objective, check_call, has_clip, resolved, terms_are_of_tokens
from .reductions import ONE, Totals, token_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IGNORED = -100


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    variant: str = "grpo",
    ratio: str | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    delta: float | None = None,
    dual_bound: float | None = None,
    tau: tuple[float, float] | None = None,
    vespo: tuple[tuple[float, float], tuple[float, float]] | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str | None = None,
    policy_weights: Tensor | None = None,
    entropy: bool = False,
    entropy_coef: float = 0.0,
    entropy_weights: Tensor | None = None,
    reduction: str = "sequence",
    weights: Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    max_length: int | float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> GRPOOutput:
    """``grpo_loss`` of ``linear_logprobs(hidden, weight, targets)``: the same numbers in one op.

    Args:
        hidden: (B, T, H), or packed (N, H) with ``cu_seqlens``: the states that predict the targets.
        weight: (V, H), the output head.
        targets: int64 (B, T) or (N,), the sampled tokens; only those that count must lie in [0, V).
        old_logp, advantages, mask: as in ``grpo_loss``.
        bias: (V,).
        temperature: a number above 0, or a tensor, () or one per token.
        softcap, logit_scale, group: as in ``linear_logprobs``.
        chunk_size: tokens whose logits stand in memory together; None chooses.
        kept: (ids, offsets), the sets that a truncated sampler kept, as in ``linear_logprobs``: one for each of the B * T or N
            tokens, masked ones counted. old_logp and ref_logp are then to be those over the same sets. A target outside its set
            has log-prob -inf: a token that has it under both policies takes no part (see ``grpo_loss``).
        entropy: measure the entropy of every token (a bool here: the op computes it); a bonus does so in any case.
        entropy_weights: as in ``grpo_loss``; needs ``entropy`` or a bonus.
        backend: the name of a backend: that one or an error; None chooses (see r1kernels.backends).

    Every other keyword is that of ``grpo_loss``. Gradients go to hidden, weight and bias, in their dtypes.

    Returns:
        GRPOOutput(loss, metrics), as ``grpo_loss`` does.

    Raises:
        ValueError, TypeError, IndexError: as ``grpo_loss`` and ``linear_logprobs`` do.

    Where the slope of a token follows from that token (grpo, dual_clip, cispo and sapo with token ratios, reinforce), the
    kernel backends compute the logits once, 6 N V H in all, and keep the gradients of their inputs until the backward, which
    scales them. Other terms need every log-prob first, and so do kept sets and a vocabulary sharded over a group: the backward computes
    the logits again, or they are kept as ``linear_logprobs`` keeps them. Without gradients, 2 N V H.

    Precision: that of the two ops. NaN and inf in hidden states that do not count change nothing. Deterministic.
    """
    checks.boolean("entropy", entropy)
    if entropy_weights is not None and not entropy and entropy_coef == 0:
        raise ValueError("entropy_weights: needs entropy=True or an entropy_coef, got neither")
    objective = resolved(
        Objective(
            variant,
            ratio,
            clip_low,
            clip_high,
            delta,
            dual_bound,
            tau,
            vespo,
            kl,
            kl_coef,
            entropy_coef,
        ),
        ref_logp is not None,
    )
    checks.tensor("targets", targets, dtypes=(torch.int64,))
    checks.tensor("mask", mask, shape=tuple(targets.shape), like=targets)
    layout = layout_of(mask, cu_seqlens)
    checks.tensor("hidden", hidden, shape=(*targets.shape, None), like=targets)
    hidden, head = check_linear(hidden, weight, targets, bias, softcap, logit_scale)
    tokens = Tokens(
        hidden.new_empty(0, dtype=torch.float32),
        old_logp,
        advantages_of(advantages, layout.num_sequences, targets),
        mask,
        ref_logp,
        policy_weights,
        None,
        entropy_weights,
        weights,
        cu_seqlens,
    )
    loss_call = LossCall(tokens, objective, reduction, Totals(num_sequences, num_tokens, max_length))
    check_call(loss_call, layout.num_sequences, targets)
    temperature = check_temperature(temperature, targets, layout.mask, hidden.dtype)
    visible = checks.values_visible(targets)
    if visible or kept is not None:
        vocabulary = weight.shape[0] if group is None else shard_of(weight, group).vocabulary
        if visible:
            checks.in_range("targets", layout.keep(targets, 0), 0, vocabulary)
        kept = check_kept(kept, layout.keep(targets, IGNORED), vocabulary, IGNORED)
    with_entropy = entropy or objective.entropy_coef != 0
    chunk_size = check_memory(chunk_size)
    call = LinearCall(hidden, head, targets, temperature, chunk_size, group, kept, with_entropy, loss_call)
    return LINEAR_GRPO_LOSS(backend, call)


class LinearCall(NamedTuple):
    hidden: Tensor
    head: Head
    targets: Tensor
    temperature: float | Tensor
    chunk_size: int  # 0: chosen
    group: ProcessGroup | None
    kept: Kept | None
    with_entropy: bool  # asked for, or part of the loss
    loss: LossCall  # its log-probs are empty and its entropies None: this op computes them


class OnePassCall(NamedTuple):
    """For terms of tokens. hidden and weight are of one dtype: float32, bfloat16 or float16."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    rows: Rows  # the whole vocabulary
    chunk_size: Size  # tokens whose logits are computed at a time; 0: chosen
    with_entropy: bool
    loss: KernelCall  # of tokens (1, N), each with a weight; only those that count are read
    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Results(NamedTuple):
    """Gradients are float32, and (0,) where not needed. They are those for an upstream gradient of ``unit``, a power of two, or (0,)
    for 1, but for float16: whoever knows the real one multiplies and rounds once, for a small weight (one token of many) is below what
    16 bits hold."""

    loss: Tensor
    metrics: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    unit: Tensor


def _shapes(call: OnePassCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return call.hidden.new_empty(shape, dtype=torch.float32)

    vocabulary = call.weight.shape[0]
    return Results(
        empty(),
        empty(len(NAMES)),
        empty(*call.hidden.shape) if call.need_hidden else empty(0),
        empty(*call.weight.shape) if call.need_weight else empty(0),
        empty(vocabulary if call.need_bias else 0),
        empty() if call.hidden.dtype == torch.float16 else empty(0),
    )


FORWARD = Kernel("linear_grpo_loss", OnePassCall, _shapes)


def _save(call: OnePassCall, results: Any) -> Any:
    _, _, *grads, unit = results
    return (*grads, unit), None


def _gradients(backend: str, inputs: Any, saved: Any, _: Any, grads: Any, needs: Any) -> list[Tensor | None]:
    *held, unit = saved
    upstream = grads[0] / unit if unit.numel() else grads[0]
    return [grad * upstream if needed else None for grad, needed in zip(held, needs, strict=True)]


_recorded = recorded(
    "linear_grpo_loss",
    FORWARD,
    differentiable=lambda call: (call.hidden, call.weight, call.rows.bias),
    save=_save,
    backward=_gradients,
    give=lambda call, results: results[:2],
    constant=(1,),
)


def _two_ops(backend: str, call: LinearCall) -> GRPOOutput:
    """linear_logprobs, then grpo_loss, whose gradient the former's backward turns into that of the logits."""
    given, head, temperature = call.loss.tokens, call.head, call.temperature
    counted = layout_of(given.mask, given.cu_seqlens).mask
    if isinstance(temperature, Tensor):
        temperature = torch.where(counted, temperature, 1.0)
    result = linear_logprobs(
        torch.where(counted.unsqueeze(-1), call.hidden, 0.0),
        head.weight,
        torch.where(counted, call.targets, IGNORED),
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        return_entropy=call.with_entropy,
        ignore_index=IGNORED,
        chunk_size=call.chunk_size or None,
        group=call.group,
        kept=call.kept,
        backend=backend,
    )
    logp, entropy = result if call.with_entropy else (result, None)
    tokens = given._replace(logp=logp, entropy=entropy)
    return GRPO_LOSS(backend, call.loss._replace(tokens=tokens))


def _on_kernels(backend: str, call: LinearCall) -> GRPOOutput:
    objective = call.loss.objective
    inputs = (call.hidden, call.head.weight, call.head.bias)
    needs = [x is not None and x.requires_grad for x in inputs]
    differentiable = torch.is_grad_enabled() and any(needs)
    if (
        not differentiable
        or call.group is not None
        or call.kept is not None
        or not terms_are_of_tokens(objective.variant, objective.ratio)
    ):
        return _two_ops(backend, call)
    hidden, head = call.hidden, call.head
    temperatures, temperature = None, call.temperature
    if isinstance(temperature, Tensor):
        temperatures, temperature = temperature.reshape(-1), 1.0
    rows = rows_of(head, call.targets, temperatures, float(temperature), IGNORED)
    one_pass = OnePassCall(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        rows,
        call.chunk_size,
        call.with_entropy,
        loss.kernel_call_of(_in_a_row(call.loss), objective, ONE, True, objective.entropy_coef != 0),
        *needs,
    )
    with autocast.off(hidden):
        value, metrics = _recorded(backend, one_pass)
    names = measured_names(
        call.loss.tokens.ref_logp is not None, call.with_entropy, has_clip(objective.variant)
    )
    return GRPOOutput(value, Metrics(metrics, names))


def _in_a_row(call: LossCall) -> Tokens:
    """All tokens as one sequence (1, N), each with its weight."""
    given = call.tokens
    layout = layout_of(given.mask, given.cu_seqlens)

    def row(values: Any) -> Any:
        if values is None:
            return None
        return layout.to_tokens(values.detach()).reshape(1, -1)

    weights = given.weights
    if weights is None:
        weights = token_weights(layout, call.reduction, call.totals, given.cu_seqlens, torch.float32)
    return Tokens(
        given.logp,
        row(given.old_logp),
        row(given.advantages),
        layout.mask.reshape(1, -1),
        row(given.ref_logp),
        row(given.policy_weights),
        None,
        row(given.entropy_weights),
        row(weights),
        None,
    )


LINEAR_GRPO_LOSS = Op("linear_grpo_loss", partial(_two_ops, "reference"), _on_kernels, decides="hidden")
