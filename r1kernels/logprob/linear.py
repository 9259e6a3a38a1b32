"""linear_logprobs: log-probs from hidden states and the head, without all logits at once.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import autocast, checks
from ..op import OUTSIDE, Kernel, Op, Size, Written, recorded
from . import columns_head, frozen, kept_head, linear_reference, parts, sharded
from .arguments import Head, check_linear, check_memory, refuse_for_several, split_temperature
from .completions import EACH_TOKEN, Completions
from .events import PADDING, asked_of
from .head import (
    Gradients,
    gradient_shapes,
    gradients,
    needs_of,
    rows_of,
    saved_gradient_shapes,
    saves,
    without_saved,
)
from .kept import Kept, check_kept
from .token import Rows, Upstream, row_results, upstream_of

STATS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    stats: tuple[str, ...] = (),
    ignore_index: int = -100,
    chunk_size: int | None = None,
    save_logits: bool | None = None,
    batch_invariant: bool = False,
    group: dist.ProcessGroup | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Any:
    r"""Log-prob (and entropy) of each target under the head's distribution.

    .. math:: logits = c \tanh(s (hidden\, weight^T + bias) / c), \qquad logp = \log softmax(logits / temperature)_y

    with s = ``logit_scale`` and c = ``softcap`` (None: no cap), i.e. ``token_logprobs`` of those logits.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64; under autocast cast as ``F.linear`` would.
        weight: (V, H), of the same dtype. bias: (V,) or None.
        targets: (...), int64, in [0, V) or ``ignore_index``; or (..., K), K per token, without ``stats`` and ``kept``.
        temperature: a number above 0 or a tensor, () or one per token (...); no gradient.
        return_entropy: also return the entropy, in nats.
        stats: names out of "log_sum_sq_probs" (log of the sum of squared probabilities), "mean_logits" (mean over the
            vocabulary of logits / temperature) and "is_top1" (the target is the first largest); same pass, no gradient.
        ignore_index: tokens with this target give 0 (False) everywhere and take no part in any gradient, whatever their
            hidden states hold.
        chunk_size: tokens per chunk; None chooses from V and a memory budget.
        save_logits: keep the logits for the backward (True, faster) or recompute them chunk by chunk (False, less memory);
            None chooses by a memory budget, a sixteenth of a GPU's memory and 256 MiB on a CPU. Where hidden alone needs a
            gradient, and of logp alone, kernels do neither (False, None): the forward works out d logp / d hidden too.
        batch_invariant: logp and entropy of a token are bitwise the same for any N, order and ``chunk_size``.
        group: a process group over which the vocabulary is sharded: ``weight`` and ``bias`` are this rank's rows, in rank
            order; everything else is the same on every rank, and so are the results and the gradient of ``hidden``. Every
            call waits once for the sizes of the shards.
        kept: (ids, offsets), the sets that a truncated sampler kept, as in ``token_logprobs``: such a token costs the kept rows of
            the head alone, forward and backward, and ``stats`` are those of the kept distribution. Tokens with an empty set go
            through the whole head, whose logits are then kept or recomputed as ``save_logits`` says; in a compiled graph, where
            their number is not known, all tokens do.
        backend: forces one (see r1kernels.backends); None chooses.

    Returns:
        logp in the shape of the targets, or a tuple (logp[, entropy (...)][, {name: values (...)}]): float32, float64 for float64
        inputs. Gradients come in the dtype of each input.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device. IndexError: a target out of range.

    Precision: float32 logits, also from 16-bit inputs; dX and dW are accumulated in float32 and rounded once. A kernel may
    round the gradient of a tile of logits to bfloat16 for the GEMMs of bfloat16 inputs, as plain PyTorch does. On CUDA the
    GEMMs of float32 inputs follow PyTorch's switch for TF32 (off as PyTorch comes), forward and backward alike. Deterministic.
    """
    hidden, head = check_linear(hidden, weight, targets, bias, softcap, logit_scale, several=True)
    asked, each = None, targets
    if targets.ndim == hidden.ndim:
        refuse_for_several(stats=len(stats) > 0, kept=kept is not None)
        vocabulary = weight.shape[0] if group is None else sharded.shard_of(weight, group).vocabulary
        if checks.values_visible(targets):
            checks.in_range("targets", targets, 0, vocabulary, allow=ignore_index)
        asked = asked_of(targets, ignore_index, vocabulary)
        each, ignore_index = asked.tokens.view(hidden.shape[:-1]), PADDING
    call = call_of(
        hidden,
        head,
        each,
        EACH_TOKEN,
        temperature=temperature,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        stats=stats,
        chunk_size=chunk_size,
        save_logits=save_logits,
        batch_invariant=batch_invariant,
        group=group,
        kept=kept,
    )
    if asked is not None:
        call = call._replace(ids=asked.ids)
    logp, entropy, extra = LINEAR_LOGPROBS(backend, call)
    results: tuple[Any, ...] = ((logp if asked is None else asked.values(logp)).view(targets.shape),)
    if return_entropy:
        results += (entropy.view(each.shape),)
    if stats:
        results += (of_names(extra, stats, targets.shape),)
    return results[0] if len(results) == 1 else results


def call_of(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    completions: Completions,
    *,
    temperature: float | Tensor,
    ignore_index: int,
    return_entropy: bool = False,
    stats: tuple[str, ...] = (),
    chunk_size: int | None,
    save_logits: bool | None,
    batch_invariant: bool = False,
    group: dist.ProcessGroup | None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> LinearCall:
    """The call for N tokens; the options are checked here."""
    checks.boolean("return_entropy", return_entropy)
    if not isinstance(stats, (tuple, list)):
        raise TypeError(f"stats: expected a tuple of names, got {type(stats).__name__}")
    for name in stats:
        checks.choice("stats", name, STATS)
    ignore_index = checks.integer("ignore_index", ignore_index)
    checks.boolean("batch_invariant", batch_invariant)
    temperatures, scalar = split_temperature(temperature, targets, ignore_index, hidden.dtype)
    shard = None if group is None else sharded.shard_of(head.weight, group)
    vocabulary = head.weight.shape[0] if shard is None else shard.vocabulary
    if checks.values_visible(targets):
        checks.in_range("targets", targets, 0, vocabulary, allow=ignore_index)
    rows = rows_of(head, targets, temperatures, scalar, ignore_index, shard)
    return LinearCall(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        rows,
        return_entropy,
        len(stats) > 0,
        check_memory(chunk_size, save_logits),
        save_logits,
        batch_invariant,
        shard,
        completions,
        check_kept(kept, targets, vocabulary, ignore_index),
    )


def of_names(extra: Tensor, stats: tuple[str, ...], shape: torch.Size) -> dict[str, Tensor]:
    """The rows of ``extra``, which holds STATS as numbers, that the names stand for."""
    found = {name: extra[STATS.index(name)].view(shape) for name in stats}
    return {name: values > 0 if name == "is_top1" else values for name, values in found.items()}


class LinearCall(NamedTuple):
    """Results: log-prob and entropy, both (N,), or the sums or means of completions, (B,), entropy empty if not wanted; and
    ``extra``, STATS (3, N) as numbers or (0, N), without a gradient.
    """

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), of the same dtype
    rows: Rows  # for N tokens and V columns; the bias in the dtype of weight
    with_entropy: bool
    with_extra: bool
    chunk_size: Size  # tokens of a tile; 0: chosen
    save_logits: bool | None  # None: ``decided`` says
    batch_invariant: bool
    shard: Annotated[sharded.Shard | None, OUTSIDE] = None
    completions: Annotated[Completions, OUTSIDE] = EACH_TOKEN
    kept: Annotated[Kept | None, OUTSIDE] = None
    ids: Annotated[Tensor | None, OUTSIDE] = None  # (N, K), events.py: the first result is log-probs (N, K)


class LinearBackwardCall(NamedTuple):
    hidden: Tensor
    weight: Tensor
    rows: Rows
    chunk_size: Size
    upstream: Upstream
    need_hidden: bool
    need_weight: bool
    need_bias: bool


class SavedBackwardCall(NamedTuple):
    logits: Written  # those of the forward, which are overwritten
    backward: LinearBackwardCall


def _shapes(call: LinearCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, stats, extra as the row kernels give them, and the raw logits (N, V) float32 if saved, else (0,)."""
    tokens, vocabulary = call.hidden.shape[0], call.weight.shape[0]
    shape = (tokens, vocabulary) if call.save_logits else 0
    return (
        *row_results(call.hidden, tokens, vocabulary, call.rows, call.with_entropy, call.with_extra),
        call.hidden.new_empty(shape, dtype=torch.float32),
    )


FORWARD = Kernel("linear_logprobs", LinearCall, _shapes)
BACKWARD = Kernel("linear_logprobs", LinearBackwardCall, gradient_shapes, suffix="_backward")
BACKWARD_OF_SAVED = Kernel("linear_logprobs", SavedBackwardCall, saved_gradient_shapes, suffix="_backward_")


def _forward(backend: str, call: LinearCall) -> tuple[Tensor, ...]:
    logp, entropy, stats, extra, logits = FORWARD(backend, call)
    if call.shard is not None:
        part = parts.Part(logp, stats, extra)
        logp, entropy, stats, extra = sharded.merge(part, call.shard, call.rows, call.with_entropy)
    return logp, entropy, stats, extra, logits


def _save(call: LinearCall, results: tuple[Tensor, ...]) -> Any:
    (_, targets, temperatures), numbers = call.rows.apart()
    size, cu_seqlens, divisor = call.completions
    logp, _, stats, _, logits = results
    of_completions = (cu_seqlens, divisor)
    tensors = (targets, temperatures, *of_completions, logp, stats, logits if call.save_logits else None)
    return tensors, (numbers, call.with_entropy, call.chunk_size, call.shard, size)


def _give(call: LinearCall, results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy, _, extra, _ = results
    reduce = call.completions.reduce
    return reduce(logp), reduce(entropy) if call.with_entropy else entropy, extra


def _gradients(backend: str, inputs: Any, tensors: Any, others: Any, grads: Any, needs: Any) -> Gradients:
    hidden, weight, bias = inputs
    targets, temperatures, cu_seqlens, divisor, logp, stats, logits = tensors
    numbers, with_entropy, chunk_size, shard, size = others
    rows = Rows.together((bias, targets, temperatures), numbers)
    upstream = upstream_of(logp, stats, grads, with_entropy, Completions(size, cu_seqlens, divisor))
    call = LinearBackwardCall(hidden, weight, rows, chunk_size, upstream, *needs)
    return gradients(backend, call, logits, shard, BACKWARD, BACKWARD_OF_SAVED)


_recorded = recorded(
    "linear_logprobs",
    _forward,
    differentiable=lambda call: (call.hidden, call.weight, call.rows.bias),
    save=_save,
    backward=_gradients,
    again=without_saved(_gradients),
    give=_give,
    constant=(2,),
)


def on_kernels(backend: str, call: LinearCall) -> tuple[Tensor, Tensor, Tensor]:
    if call.kept is not None:
        return kept_head.on_kernels(backend, call, partial(on_kernels, backend))
    if call.ids is not None:
        return columns_head.logprobs(backend, decided(call))
    differentiable, trained = needs_of(call)
    # a frozen head under the log-prob alone: its slope is worked out beside it, without the logits once more
    alone = not (call.with_entropy or call.save_logits or call.batch_invariant) and call.shard is None
    head_is_frozen = differentiable and not trained and alone
    with autocast.off(call.hidden):
        return frozen.logprobs(backend, call) if head_is_frozen else _recorded(backend, decided(call))


def decided(call: LinearCall) -> LinearCall:
    """``call``, which says whether logits are saved: where something needs a gradient and the caller, or a memory budget, wants it."""
    return call._replace(save_logits=saves(call, call.save_logits) and needs_of(call)[0])


LINEAR_LOGPROBS = Op("linear_logprobs", linear_reference.run, on_kernels, decides="hidden")
