"""linear_logprobs in plain PyTorch, chunk by chunk over the tokens: the oracle, differentiable by autograd.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import autocast, transforms
from . import columns_reference, events, kept, kept_reference, reference, sharded, token
from .completions import EACH_TOKEN

if TYPE_CHECKING:
    from .arguments import Head
    from .linear import LinearCall

_CHUNK_BYTES = 64 << 20
_SAVED_BYTES = 256 << 20
_MIN_CHUNK = 256
# a library GEMM of few rows differs in the last bits from a large one; all tiles of this many rows agree
_INVARIANT_ROWS = 64


def run(call: LinearCall) -> tuple[Tensor, Tensor, Tensor]:
    if call.ids is not None:
        dtype = torch.float64 if call.hidden.dtype == torch.float64 else torch.float32
        return *events.logprobs(events_of(call), dtype), call.hidden.new_empty((0, 0))
    verdict = None
    if call.kept is not None:
        rows, verdict = kept_reference.among_kept(call.kept, call.rows)
        call = call._replace(rows=rows)
    logp, entropy, extra = _by_chunks(call, _chunk)
    if verdict is not None:
        logp, entropy, extra = kept.with_verdict(verdict, logp, entropy, extra)
    reduce = call.completions.reduce
    return reduce(logp), reduce(entropy) if call.with_entropy else entropy, extra


def events_of(call: LinearCall) -> events.Events:
    """The events of the ids of ``call``."""
    logits, rest_entropy = _by_chunks(call, _events)
    return events.Events(logits.t(), rest_entropy)


def _by_chunks(call: LinearCall, of_chunk: Callable[[LinearCall], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``of_chunk`` gives of each chunk of the tokens, joined; tokens are the last dimension."""
    hidden, rows, shard = call.hidden, call.rows, call.shard
    # float32 (float64 stays), once for all chunks
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # 0 times NaN would reach the head
    hidden = hidden.to(dtype).masked_fill((rows.targets == rows.ignore_index).unsqueeze(-1), 0.0)
    bias = None if rows.bias is None else rows.bias.to(dtype)
    with autocast.off(hidden):
        if shard is not None:
            hidden = sharded.copy_to_group(hidden, shard)
        call = call._replace(hidden=hidden, weight=call.weight.to(dtype), rows=rows._replace(bias=bias))
        size = hidden.shape[0], call.weight.shape[0]
        chunks = [_part(call, piece) for piece in pieces(call.chunk_size, *size)]
        return joined(of_chunk, chunks, keeps(call.save_logits, *size))


def joined(
    of_chunk: Callable[[Any], tuple[Tensor, ...]], chunks: Sequence[Any], keep: bool
) -> tuple[Tensor, ...]:
    """What ``of_chunk`` gives of each chunk, joined in the last dimension; without ``keep`` the backward computes it once more."""
    found = [
        of_chunk(chunk)
        if keep
        else checkpoint(of_chunk, chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    if len(found) == 1:
        return found[0]
    return tuple(torch.cat(values, dim=-1) for values in zip(*found, strict=True))


def pieces(chunk_size: int, tokens: int, vocabulary: int) -> list[slice]:
    """The chunks of the tokens; chunk_size 0: chosen by the memory that the logits of a chunk take."""
    if not chunk_size and torch.compiler.is_compiling():
        return [slice(None)]  # a loop whose length is N would be compiled again for every N
    step = chunk_size or max(_CHUNK_BYTES // (4 * vocabulary), _MIN_CHUNK)
    return [slice(start, start + step) for start in range(0, max(tokens, 1), step)]


def keeps(save_logits: bool | None, tokens: int, vocabulary: int) -> bool:
    """Whether what the backward needs is kept, and not computed once more; None: by the memory that it takes."""
    if save_logits is None:
        save_logits = torch.compiler.is_compiling() or tokens * vocabulary * 4 <= _SAVED_BYTES
    return save_logits or not torch.is_grad_enabled() or transforms.active()


def _part(call: LinearCall, piece: slice) -> LinearCall:
    """The call of some tokens."""
    rows = call.rows
    temperatures = None if rows.temperatures is None else rows.temperatures[piece]
    rows = rows._replace(targets=rows.targets[piece], temperatures=temperatures)
    sets = None if call.kept is None else call.kept.part(piece)
    ids = None if call.ids is None else call.ids[piece]
    return call._replace(hidden=call.hidden[piece], rows=rows, kept=sets, ids=ids)


def _events(call: LinearCall) -> tuple[Tensor, ...]:
    """y (K + 1, N), and H_R (N,) or (0,)."""
    assert call.ids is not None
    rows = call.rows
    head = (call.weight, rows.bias, rows.softcap, rows.logit_scale)
    logits = _logits(call.hidden, *head, call.batch_invariant)
    if call.shard is not None:
        logits = sharded.all_columns(logits, call.shard)
    found = columns_reference.of_scaled(reference.scaled(logits, rows), call.ids, call.with_entropy)
    return found.logits.t(), found.rest_entropy


def _chunk(call: LinearCall) -> tuple[Tensor, Tensor, Tensor]:
    rows, targets = call.rows, call.rows.targets
    head = (call.weight, rows.bias, rows.softcap, rows.logit_scale)
    logits = _logits(call.hidden, *head, call.batch_invariant)
    mask = None
    if call.kept is not None:
        mask = kept.allowed(call.kept, rows.first, logits.shape[1])
        logits = torch.where(mask, logits, -torch.inf)
    extra = logits.new_empty((0, targets.shape[0]))
    if call.with_extra:
        with torch.no_grad():
            divisor = rows.temperature if rows.temperatures is None else rows.temperatures.unsqueeze(-1)
            extra = _stats(logits / divisor, targets - rows.first)
    rows = token.Rows(None, 1.0, 0.0, *rows[3:])  # the head is in the logits
    if call.shard is not None:
        logp, entropy, extra = sharded.logprobs(logits, rows, call.with_entropy, extra, call.shard)
    else:
        of_logits = token.TokenCall(logits.unsqueeze(0), rows, call.with_entropy, False, EACH_TOKEN)
        logp, entropy = token.on_reference(of_logits)
    if call.with_extra and mask is not None:
        extra[1] = _mean_of(logits.detach() / divisor, mask, call.shard)
    return logp, entropy, extra.masked_fill(targets == rows.ignore_index, 0)


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """The logits (N, V) of hidden states (N, H), all in one dtype."""
    return _logits(hidden, *head)


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    batch_invariant: bool = False,
) -> Tensor:
    if batch_invariant and hidden.shape[0] > 0:
        tokens = hidden.shape[0]
        padded = F.pad(hidden, (0, 0, 0, -tokens % _INVARIANT_ROWS))
        tiles = [F.linear(tile, weight, bias) for tile in padded.split(_INVARIANT_ROWS)]
        logits = torch.cat(tiles)[:tokens]
    else:
        logits = F.linear(hidden, weight, bias)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _stats(x: Tensor, targets: Tensor) -> Tensor:
    """STATS (3, N) of scaled logits (N, V), is_top1 as 1 or 0."""
    largest, position = x.max(dim=-1, keepdim=True)
    exponentials = (x - largest).exp()
    log_sum_sq = exponentials.square().sum(-1).log() - 2 * exponentials.sum(-1).log()
    return torch.stack((log_sum_sq, x.mean(-1), (position.squeeze(-1) == targets).to(x.dtype)))


def _mean_of(x: Tensor, mask: Tensor, shard: sharded.Shard | None) -> Tensor:
    """The mean (N,) of the columns (N, V) that the mask keeps, over all ranks."""
    sums = torch.stack((torch.where(mask, x, 0.0).sum(1), mask.sum(1).to(x.dtype)))
    total, count = sums if shard is None else sharded.sum_over_ranks_(sums, shard)
    return total / count
