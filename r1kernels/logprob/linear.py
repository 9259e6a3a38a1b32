"""linear_logprobs: log-probs from hidden states and the head, without all logits at once.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends, checks, transforms
from . import autograd, sharded
from .token import split_temperature

STATS = ("log_sum_sq_probs", "mean_logits", "is_top1")
_CHUNK_BYTES = 64 << 20
_SAVED_BYTES = 256 << 20
_MIN_CHUNK = 256
# a library GEMM of few rows differs in the last bits from a large one; all tiles of this many rows agree
_INVARIANT_ROWS = 64


class Head(NamedTuple):
    """How hidden states become logits: softcap(logit_scale * (hidden @ weight.T + bias)), softcap(z) = c tanh(z / c)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


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
    backend: str | None = None,
) -> Any:
    r"""Log-prob (and entropy) of each target under the head's distribution.

    .. math:: logits = c \tanh(s (hidden\, weight^T + bias) / c), \qquad logp = \log softmax(logits / temperature)_y

    with s = ``logit_scale`` and c = ``softcap`` (None: no cap), i.e. ``token_logprobs`` of those logits.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64; under autocast cast as ``F.linear`` would.
        weight: (V, H), of the same dtype. bias: (V,) or None.
        targets: (...), int64, in [0, V) or ``ignore_index``.
        temperature: a number above 0 or a tensor, () or one per token (...); no gradient.
        return_entropy: also return the entropy, in nats.
        stats: names out of "log_sum_sq_probs" (log of the sum of squared probabilities), "mean_logits" (mean over the
            vocabulary of logits / temperature) and "is_top1" (the target is the first largest); same pass, no gradient.
        ignore_index: tokens with this target give 0 (False) everywhere and take no part in any gradient, whatever their
            hidden states hold.
        chunk_size: tokens a chunk; None chooses from V and a memory budget.
        save_logits: keep the logits for the backward (True, faster) or recompute them chunk by chunk (False, less memory);
            None chooses by a memory budget. Where hidden alone needs a gradient, and of logp alone, kernels do neither
            (False, None): the forward works out d logp / d hidden too.
        batch_invariant: logp and entropy of a token are bitwise the same for any N, order and ``chunk_size``.
        group: a process group over which the vocabulary is sharded: ``weight`` and ``bias`` are this rank's rows, in rank
            order; everything else is the same on every rank, and so are the results and the gradient of ``hidden``. Every
            call waits once for the sizes of the shards.
        backend: forces one (see r1kernels.backends); None chooses.

    Returns:
        logp (...), or a tuple (logp[, entropy][, {name: values (...)}]): float32, float64 for float64 inputs. Gradients come
        in the dtype of each input.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device. IndexError: a target out of range.

    Precision: float32 logits, also from 16-bit inputs; dX and dW are accumulated in float32 and rounded once. A kernel may
    round the gradient of a tile of logits to bfloat16 for the GEMMs of bfloat16 inputs, as plain PyTorch does. Deterministic.
    """
    head = check_linear(hidden, weight, targets, bias, softcap, logit_scale)
    options = (return_entropy, stats, chunk_size, save_logits, batch_invariant, group)
    call = checked_call(hidden, head, targets, temperature, ignore_index, *options)
    logp, entropy, extra = backends.dispatch("linear_logprobs", backend, *call)
    results: tuple[Any, ...] = (logp.view(targets.shape),)
    if return_entropy:
        results += (entropy.view(targets.shape),)
    if stats:
        results += ({name: value.view(targets.shape) for name, value in zip(stats, extra, strict=True)},)
    return results[0] if len(results) == 1 else results


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Head:
    """Check the arguments that all ops on hidden states and a head share."""
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected shape (..., H) with H >= 1, got {tuple(hidden.shape)}")
    checks.tensor("weight", weight, dtypes=checks.FLOATS, shape=(None, hidden.shape[-1]), like=hidden)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape (V, H) with V >= 1, got {tuple(weight.shape)}")
    checks.tensor("targets", targets, dtypes=(torch.int64,), shape=hidden.shape[:-1], like=hidden)
    if bias is not None:
        checks.tensor("bias", bias, dtypes=checks.FLOATS, shape=(weight.shape[0],), like=hidden)
    if not torch.is_autocast_enabled(hidden.device.type):
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype != hidden.dtype:
                raise TypeError(f"{name}: expected the dtype of hidden, {hidden.dtype}, got {value.dtype}")
    if softcap is not None:
        softcap = checks.positive("softcap", softcap)
    logit_scale = checks.number("logit_scale", logit_scale)
    return Head(weight, bias, softcap, logit_scale)


def checked_call(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    return_entropy: bool,
    stats: tuple[str, ...],
    chunk_size: int | None,
    save_logits: bool | None,
    batch_invariant: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Any, ...]:
    """The arguments of ``reference``, that of every backend, for N tokens; the options are checked here."""
    checks.boolean("return_entropy", return_entropy)
    if not isinstance(stats, (tuple, list)):
        raise TypeError(f"stats: expected a tuple of names, got {type(stats).__name__}")
    for name in stats:
        checks.choice("stats", name, STATS)
    ignore_index = checks.integer("ignore_index", ignore_index)
    if chunk_size is not None:
        chunk_size = checks.integer("chunk_size", chunk_size, minimum=1)
    if save_logits is not None:
        checks.boolean("save_logits", save_logits)
    checks.boolean("batch_invariant", batch_invariant)
    temperatures, scalar = split_temperature(temperature, targets, ignore_index, hidden.dtype)
    shard = None if group is None else sharded.shard_of(head.weight, group)
    vocabulary = head.weight.shape[0] if shard is None else shard.vocabulary
    if checks.values_visible(targets):
        checks.in_range("targets", targets, 0, vocabulary, allow=ignore_index)
    rows = (
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        targets.reshape(-1),
        temperatures,
        scalar,
        ignore_index,
    )
    return *rows, return_entropy, tuple(stats), chunk_size, save_logits, batch_invariant, shard


def reference(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    stats: tuple[str, ...],
    chunk_size: int | None,
    save_logits: bool | None,
    batch_invariant: bool,
    shard: sharded.Shard | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Plain PyTorch, chunk by chunk over the tokens; (logp (N,), entropy (N,) or empty, one (N,) a name of ``stats``)."""
    hidden, head = _in_float32(*cast_as_linear_would(hidden, head))
    hidden = hidden.masked_fill(
        (targets == ignore_index).unsqueeze(-1), 0.0
    )  # 0 times NaN would reach the head
    with torch.autocast(hidden.device.type, enabled=False):
        if shard is not None:
            hidden = sharded.copy_to_group(hidden, shard)
        tokens, vocabulary = hidden.shape[0], head.weight.shape[0]
        if chunk_size is None and torch.compiler.is_compiling():
            pieces = [slice(None)]  # a loop whose length is N would be compiled anew for every N
        else:
            step = chunk_size or max(_CHUNK_BYTES // (4 * vocabulary), _MIN_CHUNK)
            pieces = [slice(start, start + step) for start in range(0, max(tokens, 1), step)]
        if save_logits is None:
            save_logits = torch.compiler.is_compiling() or tokens * vocabulary * 4 <= _SAVED_BYTES
        keep = save_logits or not torch.is_grad_enabled() or transforms.active()
        chunks = []
        for rows in pieces:
            arguments = (
                hidden[rows],
                head,
                targets[rows],
                None if temperatures is None else temperatures[rows],
                temperature,
                ignore_index,
                entropy,
                stats,
                batch_invariant,
                shard,
            )
            if keep:
                chunks.append(_chunk(*arguments))
            else:
                chunks.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        if len(chunks) == 1:
            return chunks[0]
        logp, value, extra = zip(*chunks, strict=True)
        return torch.cat(logp), torch.cat(value), tuple(map(torch.cat, zip(*extra, strict=True)))


def cast_as_linear_would(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Inputs cast as autocast casts those of F.linear."""
    weight, bias = head.weight, head.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return hidden, head._replace(weight=weight, bias=bias)


def _in_float32(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Inputs in float32 (float64 stays), once for all chunks."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), head._replace(weight=head.weight.to(dtype), bias=bias)


def _chunk(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    stats: tuple[str, ...],
    batch_invariant: bool,
    shard: sharded.Shard | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    logits = head_logits(hidden, head, batch_invariant)
    arguments = (targets, temperatures, temperature, ignore_index, entropy)
    extra = logits.new_empty((0, targets.shape[0]))
    if stats:
        first = 0 if shard is None else shard.first
        with torch.no_grad():
            extra = _stats(
                logits / (temperature if temperatures is None else temperatures.unsqueeze(-1)),
                targets - first,
            )
    if shard is None:
        logp, value = autograd.run("reference", logits.unsqueeze(0), *arguments, False)
        extra = extra.masked_fill(targets == ignore_index, 0)
    else:
        logp, value, extra = sharded.run(logits, *arguments, extra, shard)
    return logp, value, of_names(extra, stats)


def of_names(extra: Tensor, stats: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The rows of ``extra``, which holds STATS as numbers, that the names stand for."""
    rows = dict(zip(STATS, extra.unbind(0), strict=False))
    return tuple(rows[name] > 0 if name == "is_top1" else rows[name] for name in stats)


def head_logits(hidden: Tensor, head: Head, batch_invariant: bool = False) -> Tensor:
    """The logits (N, V) of hidden states (N, H), all in one dtype."""
    if batch_invariant and hidden.shape[0] > 0:
        tokens = hidden.shape[0]
        padded = F.pad(hidden, (0, 0, 0, -tokens % _INVARIANT_ROWS))
        tiles = [F.linear(tile, head.weight, head.bias) for tile in padded.split(_INVARIANT_ROWS)]
        logits = torch.cat(tiles)[:tokens]
    else:
        logits = F.linear(hidden, head.weight, head.bias)
    if head.logit_scale != 1.0:
        logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _stats(x: Tensor, targets: Tensor) -> Tensor:
    """STATS (3, N) of scaled logits (N, V), is_top1 as 1 or 0."""
    largest, position = x.max(dim=-1, keepdim=True)
    exponentials = (x - largest).exp()
    log_sum_sq = exponentials.square().sum(-1).log() - 2 * exponentials.sum(-1).log()
    return torch.stack((log_sum_sq, x.mean(-1), (position.squeeze(-1) == targets).to(x.dtype)))
