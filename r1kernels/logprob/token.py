"""token_logprobs: log-prob and entropy of chosen tokens from logits; the row kernels that all ops of the family share.

B, T leading dimensions, V vocabulary, N = B * T rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, transforms
from ..op import Contiguous, Float32, Kernel, Op, Size, Written, nothing, recorded
from . import columns, kept_reference, kept_rows, reference
from .arguments import (
    check_logits,
    check_targets,
    in_rows,
    refuse_for_several,
    split_temperature,
    why_not_overwritable,
)
from .completions import EACH_TOKEN, Completions
from .events import PADDING, asked_of
from .kept import Kept, check_kept

MOST_PROGRAMS = 2**31 - 1  # in the first dimension of a GPU's grid
SEGMENT = 1 << 15  # logits that a program of Triton reads; few rows of a large vocabulary still fill a GPU


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    kept: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-prob of each target and, on request, the entropy of its distribution, in one pass over the logits.

    .. math:: logp = \log softmax(z / temperature)_y, \qquad H = -\sum_v p_v \log p_v

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides.
        targets: (...), int64, in [0, V) or ``ignore_index``; or (..., K), K per token.
        temperature: a number above 0, or a tensor: () or (...), one per token; it gets no gradient.
        return_entropy: also return the entropy, in nats.
        ignore_index: tokens with this target give log-prob 0, entropy 0 and a zero gradient row.
        inplace_backward: write the gradient over the logits, which must not be a leaf or a view of one, expanded or
            overlapping. A later reader of the logits, a second backward among them, gets autograd's error.
        kept: (ids, offsets), the sets that a truncated sampler kept (top-k, top-p, min-p): that of the n-th of the flattened targets,
            ignored ones counted, is ids[offsets[n] : offsets[n + 1]], int32 or int64; an empty one is the whole vocabulary.
            Log-prob and entropy are those of the distribution renormalised over the set. A target outside its set has log-prob
            -inf, without a gradient; an id that is there twice counts once (with ``debug_checks`` both are errors). Not together
            with ``inplace_backward`` or K targets. On CUDA every call reads a few counts on the host.
        backend: "cuda", "triton", "cpu" or "reference": that one or an error; None chooses (see r1kernels.backends).

    Returns:
        logp in the shape of the targets, or (logp, entropy (...)): float32, float64 for float64 logits. Gradients come in the dtype
        of the logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a temperature that is not above 0.
        IndexError: a target out of range (on the CPU; on CUDA the row becomes NaN unless ``debug_checks(True)``).

    Precision: float32 accumulation in a form without cancellation (specs: ``reference.py``): logp <= 0, entropy >= 0, and
    neither they nor the gradient lose digits where one logit leads. -inf logits have probability 0; a target at -inf has
    logp -inf; a row that is all -inf, or holds NaN or +inf, gives NaN for that row alone. Deterministic, and bitwise independent of
    the other rows and the number of threads. float64 is served by the reference alone.
    """
    check_logits(logits)
    several = check_targets(targets, logits.shape[:-1], logits)
    checks.boolean("return_entropy", return_entropy)
    ignore_index = checks.integer("ignore_index", ignore_index)
    if checks.boolean("inplace_backward", inplace_backward):
        refusal = why_not_overwritable(logits)
        if refusal:
            raise ValueError(f"inplace_backward: expected logits {refusal}")
        if kept is not None:
            raise ValueError("inplace_backward: expected False together with kept, got True")
    if checks.values_visible(targets):
        checks.in_range("targets", targets, 0, logits.shape[-1], allow=ignore_index)
    each, asked = targets, None
    if several:
        refuse_for_several(inplace_backward=inplace_backward, kept=kept is not None)
        asked = asked_of(targets, ignore_index, logits.shape[-1])
        each, ignore_index = asked.tokens.view(targets.shape[:-1]), PADDING
    temperatures, scalar = split_temperature(temperature, each, ignore_index, logits.dtype)
    rows = plain_rows(logits, each.reshape(-1), temperatures, scalar, ignore_index)
    sets = check_kept(kept, each, logits.shape[-1], ignore_index)
    ids = None if asked is None else asked.ids
    call = TokenCall(in_rows(logits), rows, return_entropy, inplace_backward, EACH_TOKEN, sets, ids)
    logp, entropy = TOKEN_LOGPROBS(backend, call)
    logp = (logp if asked is None else asked.values(logp)).view(targets.shape)
    return (logp, entropy.view(each.shape)) if return_entropy else logp


class Rows(NamedTuple):
    """What every kernel is told about its rows.

    A raw logit r in column v stands for the logit z = cap(logit_scale * (r + bias_v)), cap(u) = softcap tanh(u / softcap),
    or u where softcap is 0; the gradient is that of r.

    A slab, some columns of a larger vocabulary (``vocabulary`` > V), gives parts for the caller to merge: stats of these
    columns, logp = the logit of the target before the division by the temperature (NaN where the target lies in another slab,
    0 where it is ignored), an empty entropy and the ``extra`` of these columns' own distribution; ``with_entropy`` then says
    whether E' is wanted. The backward of a slab takes the merged stats and the final logp.

    A target out of range that is not ``ignore_index``, or a temperature that is not above 0: a RuntimeError from the cpu
    kernels, NaN in that row on a GPU.
    """

    bias: Float32 | None  # (V,)
    logit_scale: float
    softcap: float
    targets: Contiguous  # (N,) int64, in [0, vocabulary) or ignore_index
    temperatures: Float32 | None  # (N,); None: ``temperature`` holds for all rows
    temperature: float
    ignore_index: int
    first: Size  # the logits are the columns [first, first + V)
    vocabulary: Size  # of a vocabulary of this size

    def apart(self) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """(tensors, numbers), for autograd to keep; ``together`` undoes it."""
        bias, logit_scale, softcap, targets, temperatures, *others = self
        return (bias, targets, temperatures), (logit_scale, softcap, *others)

    @classmethod
    def together(cls, tensors: Any, numbers: Any) -> Rows:
        """Rows from what ``apart`` gives."""
        (bias, targets, temperatures), (logit_scale, softcap, *others) = tensors, numbers
        return cls(bias, logit_scale, softcap, targets, temperatures, *others)


class Upstream(NamedTuple):
    """What a backward is told about its rows: results of the forward, and the gradients of log-prob and entropy."""

    logp: Tensor
    stats: Tensor
    grad_logp: Contiguous | None  # (N,) float32
    grad_entropy: Contiguous | None  # the same
    # (N,) int32, contiguous: row r takes grad_logp[sequences[r]] and grad_entropy[sequences[r]], which then have one entry
    # per sequence
    sequences: Tensor | None


class RowsCall(NamedTuple):
    logits: Tensor  # (B, T, V); any strides on B and T, stride 1 on V
    rows: Rows
    with_entropy: bool
    with_extra: bool  # log_sum_sq_probs, mean_logits, is_top1 of linear_logprobs


class RowsBackwardCall(NamedTuple):
    logits: Tensor
    rows: Rows
    upstream: Upstream


class RowsBackwardOverCall(NamedTuple):
    logits: Written
    rows: Rows
    upstream: Upstream


class RowsBackwardIntoCall(NamedTuple):
    logits: Tensor
    rows: Rows
    upstream: Upstream
    grad: Written  # the shape of the logits, any strides on B and T; of float32 logits any dtype


def row_results(
    like: Tensor, count: int, columns: int, rows: Rows, with_entropy: bool, with_extra: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results of ``count`` rows of so many columns: logp, entropy, stats, extra, all float32.

    logp (N,); entropy (N,), or (0,) where it is not wanted or of a slab; stats (3, N): M, S', E' of reference.py, for the
    backward of the same backend alone; M is the largest logit before the division by the temperature, E' is 0 without entropy;
    extra (3, N): log_sum_sq_probs, mean_logits, is_top1 (1 or 0), or (0, N).
    """
    whole = rows.vocabulary == columns
    return (
        like.new_empty(count, dtype=torch.float32),
        like.new_empty(count if with_entropy and whole else 0, dtype=torch.float32),
        like.new_empty((3, count), dtype=torch.float32),
        like.new_empty((3 if with_extra else 0, count), dtype=torch.float32),
    )


def _shapes(call: RowsCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, columns = call.logits.shape
    return row_results(call.logits, batch * tokens, columns, call.rows, call.with_entropy, call.with_extra)


def _backward_shape(call: RowsBackwardCall) -> Tensor:
    """The gradient of the raw logits, contiguous, in their dtype."""
    return call.logits.new_empty(call.logits.shape)


FORWARD = Kernel("token_logprobs", RowsCall, _shapes)
BACKWARD = Kernel("token_logprobs", RowsBackwardCall, _backward_shape, suffix="_backward")
BACKWARD_OVER = Kernel("token_logprobs", RowsBackwardOverCall, nothing, suffix="_backward_")
BACKWARD_INTO = Kernel(
    "token_logprobs", RowsBackwardIntoCall, nothing, backends=("cuda",), suffix="_backward_into"
)


class TokenCall(NamedTuple):
    """Results (log-prob, entropy), both (N,), or the sums or means of completions, (B,); entropy is empty if not wanted."""

    logits: Tensor  # (B, T, V), any strides
    rows: Rows  # the whole vocabulary, without bias, scale and cap
    with_entropy: bool
    inplace_backward: bool
    completions: Completions
    kept: Kept | None = None
    ids: Tensor | None = None  # (N, K), events.py: the results are (log-probs (N, K), entropy)


def _forward(backend: str, call: TokenCall) -> tuple[Tensor, ...]:
    rows = RowsCall(call.logits, call.rows, call.with_entropy, False)
    return reference.forward(rows) if backend == "reference" else FORWARD(backend, rows)


def _save(call: TokenCall, results: tuple[Tensor, ...]) -> Any:
    rows, completions = call.rows, call.completions
    logp, _, stats, *_ = results
    tensors = (rows.targets, rows.temperatures, completions.cu_seqlens, completions.divisor, logp, stats)
    numbers = (rows.temperature, rows.ignore_index)
    return tensors, (numbers, call.with_entropy, call.inplace_backward, completions.size)


def _give(call: TokenCall, results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    logp, entropy, *_ = results
    if call.completions.size is None:
        return logp, entropy
    reduce = call.completions.reduce
    return reduce(logp), reduce(entropy) if call.with_entropy else entropy


def _gradients(backend: str, inputs: Any, tensors: Any, others: Any, grads: Any, needs: Any) -> list[Tensor]:
    (logits,) = inputs
    targets, temperatures, cu_seqlens, divisor, logp, stats = tensors
    numbers, with_entropy, inplace, size = others
    rows = plain_rows(logits, targets, temperatures, *numbers)
    upstream = upstream_of(logp, stats, grads, with_entropy, Completions(size, cu_seqlens, divisor))
    if not inplace:
        call = RowsBackwardCall(logits, rows, upstream)
        return [reference.backward(call) if backend == "reference" else BACKWARD(backend, call)]
    grad = logits.detach()
    if backend == "reference":
        grad.copy_(reference.backward(RowsBackwardCall(grad, rows, upstream)))
    else:
        BACKWARD_OVER(backend, RowsBackwardOverCall(grad, rows, upstream))
    # a later reader of the logits, a second backward among them, now gets autograd's version error
    torch.autograd.graph.increment_version(logits)
    return [grad]


def upstream_of(
    logp: Tensor, stats: Tensor, grads: Any, with_entropy: bool, completions: Completions
) -> Upstream:
    """What a backward is told, from the gradients of (log-prob, entropy, ...) of tokens or completions."""
    return Upstream(
        logp,
        stats,
        completions.gradient(grads[0]),
        completions.gradient(grads[1] if with_entropy else None),
        completions.sequences(logp.shape[0], logp.device),
    )


_recorded = recorded(
    "token_logprobs",
    _forward,
    differentiable=lambda call: (call.logits,),
    save=_save,
    backward=_gradients,
    give=_give,
)


def on_reference(call: TokenCall) -> tuple[Tensor, Tensor]:
    """Its own gradient is exact where that of autograd loses digits; transforms of PyTorch follow the latter."""
    if call.kept is not None:
        return kept_reference.of_logits(call, on_reference)
    if call.ids is not None:
        return columns.logprobs("reference", call)
    tokens = TokenCall(call.logits, call.rows, call.with_entropy, call.inplace_backward, EACH_TOKEN)
    results = _forward("reference", tokens) if transforms.active() else _recorded("reference", tokens)
    return _give(call, results)


def on_kernels(backend: str, call: TokenCall) -> tuple[Tensor, Tensor]:
    if call.kept is not None:
        return kept_rows.on_kernels(backend, call, partial(on_kernels, backend))
    if call.ids is not None:
        return columns.logprobs(backend, call)
    logits = call.logits
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        # kernels read rows of stride 1, of an empty tensor too, which contiguous() gives back as it is
        logits = logits.clone(memory_format=torch.contiguous_format)
        call = call._replace(logits=logits)
    return _recorded(backend, call)


def limits(backend: str, call: TokenCall) -> tuple[str, ...]:
    if backend != "triton":
        return ()
    columns = call.logits.shape[-1]
    rows = call.logits.numel() // columns
    if rows * segments(columns) <= MOST_PROGRAMS:
        return ()
    return (f"{rows} rows of {columns} logits, a grid holds at most {MOST_PROGRAMS} programs",)


def segments(columns: int) -> int:
    """The programs of Triton that share a row: they depend on V alone, so that a row's bits depend on nothing else."""
    return -(-columns // SEGMENT)


TOKEN_LOGPROBS = Op("token_logprobs", on_reference, on_kernels, decides="logits", limits=limits)


def plain_rows(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, ignore_index: int
) -> Rows:
    """The rows of logits (..., V) that are the whole vocabulary and need no bias, scale or cap."""
    return Rows(None, 1.0, 0.0, targets, temperatures, temperature, ignore_index, 0, logits.shape[-1])
