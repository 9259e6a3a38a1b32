"""grouped_logprobs: log-probs of the G completions of each prompt, as sums, means or token values.

Shapes: B completions, G completions a prompt, T padded length, N packed tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..op import Op
from . import linear, linear_reference, token
from .arguments import check_linear, check_logits, in_rows, split_temperature
from .completions import EACH_TOKEN, Completions
from .kept import check_kept

REDUCTIONS = ("sum", "mean", "none")


class GroupedLogprobs(NamedTuple):
    """Per completion: ``logp`` (B // G, G) (token values with reduce="none"), ``counts`` (B // G, G) int64, ``entropy``."""

    logp: Tensor
    counts: Tensor
    entropy: Tensor | None


def grouped_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group_size: int,
    temperature: float | Tensor = 1.0,
    reduce: str = "sum",
    return_entropy: bool = False,
    kept: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> GroupedLogprobs:
    """Sum or mean over each completion of the log-probs of its tokens.

    Args:
        logits: (B, T, V) padded, or (N, V) packed; float32, bfloat16, float16 or float64.
        targets: (B, T) or (N,), int64; where the mask is 0 they, and the logits, may hold anything.
        mask: (B, T), bool or 0 / 1; padded layout; None: every token counts.
        cu_seqlens: (B + 1,), int32 or int64, 0 first, N last: completion i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]).
        group_size: G, completions a prompt; they stand next to each other and G divides B.
        temperature: a number above 0 or a tensor, () or one per token; no gradient.
        reduce: "sum", "mean" (0 for an empty completion) or "none" (token values, 0 where masked).
        return_entropy: also give the entropy, reduced like logp.
        kept: as in ``token_logprobs``: one set for each of the B * T or N tokens, masked ones counted.
        backend: forces one (see r1kernels.backends); None chooses.

    Returns:
        GroupedLogprobs(logp, counts, entropy or None); float32, float64 for float64 logits.

    Raises:
        TypeError, ValueError, IndexError: as ``token_logprobs``; mask together with cu_seqlens; G that does not divide B.

    Precision: as ``token_logprobs``; sums run over the tokens in order, in float32. Deterministic.
    """
    check_logits(logits, ndim=2 if cu_seqlens is not None else 3)
    checks.tensor("targets", targets, dtypes=(torch.int64,), shape=logits.shape[:-1], like=logits)
    group_size = checks.integer("group_size", group_size, minimum=1)
    _check_groups(targets, mask, cu_seqlens, group_size, reduce, return_entropy)
    counted, ignored = _masked_targets(targets, mask, logits.shape[-1])
    temperatures, scalar = split_temperature(temperature, counted, ignored, logits.dtype)
    counts = _counts(counted != ignored, cu_seqlens)
    rows = token.plain_rows(logits, counted.reshape(-1), temperatures, scalar, ignored)
    completions = _completions(counts, cu_seqlens, reduce)
    sets = check_kept(kept, counted, logits.shape[-1], ignored)
    call = token.TokenCall(in_rows(logits), rows, return_entropy, False, completions, sets)
    logp, entropy = GROUPED_LOGPROBS(backend, call)
    return _shaped(logp, entropy, counts, targets.shape, group_size, reduce, return_entropy)


def linear_grouped_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group_size: int,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduce: str = "sum",
    return_entropy: bool = False,
    stats: tuple[str, ...] = (),
    ignore_index: int = -100,
    chunk_size: int | None = None,
    save_logits: bool | None = None,
    batch_invariant: bool = False,
    group: Any = None,
    kept: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> GroupedLogprobs | tuple[GroupedLogprobs, dict[str, Tensor]]:
    """``grouped_logprobs`` from hidden states (B, T, H) or (N, H) and the head, without all logits at once.

    The options are those of ``linear_logprobs`` and ``grouped_logprobs``. A token whose target is ``ignore_index`` does not
    count; where the mask is 0 targets and hidden states may hold anything. With ``stats`` the result is
    (GroupedLogprobs, {name: token values}).
    """
    hidden, head = check_linear(hidden, weight, targets, bias, softcap, logit_scale)
    ignore_index = checks.integer("ignore_index", ignore_index)
    dimensions = 2 if cu_seqlens is not None else 3
    if hidden.ndim != dimensions:
        raise ValueError(f"hidden: expected {dimensions} dimensions, got shape {tuple(hidden.shape)}")
    group_size = checks.integer("group_size", group_size, minimum=1)
    _check_groups(targets, mask, cu_seqlens, group_size, reduce, return_entropy)
    counted = targets if mask is None else torch.where(mask != 0, targets, ignore_index)
    counts = _counts(counted != ignore_index, cu_seqlens)
    call = linear.call_of(
        hidden,
        head,
        counted,
        _completions(counts, cu_seqlens, reduce),
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
    logp, entropy, extra = LINEAR_GROUPED_LOGPROBS(backend, call)
    grouped = _shaped(logp, entropy, counts, targets.shape, group_size, reduce, return_entropy)
    return (grouped, linear.of_names(extra, stats, targets.shape)) if stats else grouped


GROUPED_LOGPROBS = Op(
    "grouped_logprobs", token.on_reference, token.on_kernels, decides="logits", limits=token.limits
)
LINEAR_GROUPED_LOGPROBS = Op(
    "linear_grouped_logprobs", linear_reference.run, linear.on_kernels, decides="hidden"
)


def _check_groups(
    targets: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    group_size: int,
    reduce: str,
    return_entropy: bool,
) -> None:
    checks.choice("reduce", reduce, REDUCTIONS)
    checks.boolean("return_entropy", return_entropy)
    if mask is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "mask: expected None together with cu_seqlens (packed tokens all count), got a mask"
            )
        checks.tensor("mask", mask, shape=targets.shape, like=targets)
    if cu_seqlens is not None:
        checks.tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32, torch.int64), ndim=1, like=targets)
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens: expected shape (B + 1,), got (0,)")
        if checks.values_visible(cu_seqlens):
            checks.boundaries("cu_seqlens", cu_seqlens, targets.shape[0])
    completions = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if completions % group_size:
        raise ValueError(f"group_size: expected a divisor of the {completions} completions, got {group_size}")


def _masked_targets(targets: Tensor, mask: Tensor | None, vocabulary: int) -> tuple[Tensor, int]:
    """Targets with -1 where the mask is 0, and that mark; the others checked."""
    ignored = -1
    counted = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask != 0
    if checks.values_visible(targets):
        checks.in_range("targets", torch.where(counted, targets, 0), 0, vocabulary)
    # an unchecked target below 0 must stay an error (NaN), not become a masked one
    return torch.where(counted, torch.where(targets < 0, vocabulary, targets), ignored), ignored


def _counts(counted: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How many tokens of each completion count, (B,) int64."""
    if cu_seqlens is None:
        return counted.sum(-1)
    before = torch.cat((counted.new_zeros(1, dtype=torch.int64), counted.cumsum(0)))
    # bounds on a GPU were not looked at: those of a broken call must not reach outside
    bounds = cu_seqlens.long().clamp(0, counted.shape[0])
    return before[bounds[1:]] - before[bounds[:-1]]


def _completions(counts: Tensor, cu_seqlens: Tensor | None, reduce: str) -> Completions:
    if reduce == "none":
        return EACH_TOKEN
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
    divisor = counts.clamp(min=1).float() if reduce == "mean" else None
    return Completions(counts.shape[0], bounds, divisor)


def _shaped(
    logp: Tensor,
    entropy: Tensor,
    counts: Tensor,
    shape: torch.Size,
    group_size: int,
    reduce: str,
    with_entropy: bool,
) -> GroupedLogprobs:
    wanted = shape if reduce == "none" else (-1, group_size)
    grid = counts.view(-1, group_size)
    return GroupedLogprobs(logp.view(wanted), grid, entropy.view(wanted) if with_entropy else None)
