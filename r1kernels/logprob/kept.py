"""Kept sets: the tokens that a truncated sampler (top-k, top-p, min-p) chose from, for each position.

CSR: the set of token n is ids[offsets[n] : offsets[n + 1]]; an empty one stands for the whole vocabulary. Log-prob and entropy
are then those of the distribution that is renormalised over the set. N tokens, V vocabulary, Z ids in all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..op import Kernel, Size

# the place of the target of a token whose set does not matter: it is empty, or the token is ignored
NO_SET = -1


class Kept(NamedTuple):
    ids: Tensor  # (Z,) int64
    offsets: Tensor  # (N + 1,) int64, on the device of ids

    def part(self, tokens: slice) -> Kept:
        """The sets of some consecutive tokens; the ids stay where they are."""
        return Kept(self.ids, self.offsets[tokens.start : None if tokens.stop is None else tokens.stop + 1])

    def some(self, tokens: Tensor) -> Kept:
        """The sets of the tokens at which (N,) bool is True, without the ids of the others."""
        sizes = self.offsets.diff()
        offsets = torch.nn.functional.pad(sizes[tokens].cumsum(0), (1, 0))
        return Kept(self.ids[tokens.repeat_interleave(sizes)], offsets)


def check_kept(kept: Any, targets: Tensor, vocabulary: int, ignore_index: int) -> Kept | None:
    """``kept`` of a public op, (ids, offsets) for the flattened targets, checked; None where every set is empty.

    ids: (Z,) int32 or int64, in [0, vocabulary). offsets: (N + 1,) int32 or int64, from 0 to Z in rising order, on the device of
    the targets or on the CPU.
    """
    if kept is None:
        return None
    if not isinstance(kept, (tuple, list)) or len(kept) != 2:
        raise TypeError(f"kept: expected a pair (ids, offsets) of tensors, got {type(kept).__name__}")
    integers, tokens = (torch.int32, torch.int64), targets.numel()
    ids = checks.tensor("kept ids", kept[0], dtypes=integers, ndim=1, like=targets)
    offsets = checks.tensor("kept offsets", kept[1], dtypes=integers, shape=(tokens + 1,))
    if offsets.device != targets.device and not offsets.is_cpu:
        raise ValueError(
            f"kept offsets: expected a tensor on {targets.device} or the CPU, got one on {offsets.device}"
        )
    if checks.values_visible(offsets):
        checks.boundaries("kept offsets", offsets, ids.shape[0])
    elif offsets.is_cuda:  # whatever they hold, nothing outside is reached
        offsets = offsets.clamp(0, ids.shape[0]).cummax(0).values
        offsets[0], offsets[-1] = 0, ids.shape[0]
    ids, offsets = ids.long().contiguous(), offsets.to(targets.device, torch.int64).contiguous()
    if ids.shape[0] == 0:
        return None
    if checks.values_visible(ids):
        bad = (ids < 0) | (ids >= vocabulary)
        if bool(bad.any()):
            (place,) = checks.first_bad(bad)
            raise ValueError(
                f"kept ids: expected values in [0, {vocabulary}), got {int(ids[place])} at position {place}"
            )
    if checks.debugging() and not torch.compiler.is_compiling():
        _check_members(Kept(ids, offsets), targets.reshape(-1), ignore_index)
    return Kept(ids, offsets)


def _check_members(kept: Kept, targets: Tensor, ignore_index: int) -> None:
    """With debug_checks: every target lies in its set, which holds no id twice."""
    tokens = token_of_each(kept)
    order = kept.ids.argsort(stable=True)
    again = _repeats(kept.ids, tokens, order)
    if bool(again.any()):
        (place,) = checks.first_bad(again)
        raise ValueError(
            f"kept ids: expected every id once in the set of a token, got {int(kept.ids[place])} again at position {place}, "
            f"for token {int(tokens[place])}"
        )
    found = torch.zeros_like(targets).index_add(0, tokens, (kept.ids == targets[tokens]).long())
    outside = (found == 0) & (kept.offsets.diff() > 0) & (targets != ignore_index)
    if bool(outside.any()):
        (token,) = checks.first_bad(outside)
        raise ValueError(
            f"targets: expected a member of the kept set, got {int(targets[token])} at position {token}"
        )


def token_of_each(kept: Kept) -> Tensor:
    """The token of each id, (Z,); of a part's ids alone it means something."""
    places = torch.arange(kept.ids.shape[0], device=kept.ids.device)
    return torch.searchsorted(kept.offsets, places, right=True) - 1


def _repeats(ids: Tensor, tokens: Tensor, order: Tensor) -> Tensor:
    """Where an id stands in the set of its token for a second time; ``order`` sorts the ids and is stable."""
    ids, tokens = ids[order], tokens[order]
    same = (ids[1:] == ids[:-1]) & (tokens[1:] == tokens[:-1])
    return torch.zeros_like(ids, dtype=torch.bool).index_put((order[1:],), same)


class EntriesCall(NamedTuple):
    ids: Tensor  # (Z,) int64
    offsets: Tensor  # (N + 1,) int64
    targets: Tensor  # (N,) int64
    ignore_index: int
    vocabulary: Size


class Entries(NamedTuple):
    """What the kernels are told about kept sets. An entry is one id of one token's set."""

    tokens: Tensor  # (Z,) int64, the token of an entry; -1: it takes no part, as a repeated id or one of an ignored token
    order: Tensor  # (Z,) int64, the entries by id, those of one id by token
    places: Tensor  # (N,) int64, where the target stands in its set, 0 if it does not, or NO_SET
    # (N,) float32: 0, or what the log-prob is without a look at the logits: -inf where the target is outside its set, NaN where
    # an id or the target is no token at all, which eager calls on the CPU have checked
    verdict: Tensor


def _entries_shapes(call: EntriesCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, targets = call.ids, call.targets
    return Entries(
        torch.empty_like(ids),
        torch.empty_like(ids),
        torch.empty_like(targets),
        targets.new_empty(targets.shape, dtype=torch.float32),
    )


ENTRIES = Kernel("kept_entries", EntriesCall, _entries_shapes)


@ENTRIES.implement("cpu")
@ENTRIES.implement("cuda")
@ENTRIES.implement("triton")
def entries(call: EntriesCall) -> Entries:
    ids, offsets, targets, ignore_index, vocabulary = call
    kept, count = Kept(ids, offsets), ids.shape[0]
    tokens = token_of_each(kept).clamp(0, targets.shape[0] - 1)
    wrong = (ids < 0) | (ids >= vocabulary)
    if ids.is_cpu and not torch.compiler.is_compiling():  # the caller in a compiled graph has not looked
        checks.boundaries("kept offsets", offsets, count)
        if bool(wrong.any()):
            raise RuntimeError(f"kept ids: expected values in [0, {vocabulary})")
    order = ids.argsort(stable=True)
    ignored = targets == ignore_index
    no_part = _repeats(ids, tokens, order) | wrong | ignored[tokens]
    # integers: whatever the order of the threads, the results are the same
    place = torch.arange(count, device=ids.device) - offsets[tokens]
    place = torch.where(ids == targets[tokens], place, count)
    first = targets.new_full(targets.shape, count).scatter_reduce_(0, tokens, place, "amin")
    some_wrong = torch.zeros_like(targets).scatter_reduce_(0, tokens, wrong.long(), "amax") > 0
    with_set = (offsets.diff() > 0) & ~ignored
    outside = with_set & (first == count)
    broken = with_set & (some_wrong | (targets < 0) | (targets >= vocabulary))
    verdict = torch.zeros_like(targets, dtype=torch.float32).masked_fill_(outside, -torch.inf)
    return Entries(
        torch.where(no_part, -1, tokens),
        order,
        torch.where(with_set, torch.where(outside, 0, first), NO_SET),
        verdict.masked_fill_(broken, torch.nan),
    )


def with_verdict(
    verdict: Tensor, logp: Tensor, entropy: Tensor, extra: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy (N,) or (0,), and extra (3, N) or (0, N) where some targets are outside their sets: these get no gradient."""
    logp = torch.where(verdict == 0, logp, verdict)
    if entropy.shape[0] > 0:
        entropy = torch.where(verdict.isnan(), torch.nan, entropy)
    if extra.shape[0] > 0:
        extra = torch.cat((extra[:2], extra[2:].masked_fill(verdict != 0, 0.0)))
    return logp, entropy, extra


def allowed(kept: Kept, first: int, columns: int) -> Tensor:
    """(N, V) bool: the columns [first, first + V) of the vocabulary that the sets hold; all of them for an empty set."""
    tokens = kept.offsets.shape[0] - 1
    row, column = token_of_each(kept), kept.ids - first
    here = (row >= 0) & (row < tokens) & (column >= 0) & (column < columns)
    place = torch.where(here, row * columns + column, tokens * columns)
    flags = torch.zeros(tokens * columns + 1, dtype=torch.bool, device=kept.ids.device)
    flags = flags.index_fill(0, place, True)[:-1].view(tokens, columns)
    return flags | (kept.offsets.diff() == 0).unsqueeze(1)
