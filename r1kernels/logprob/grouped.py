"""grouped_logprobs: log-probs of the G completions of each prompt, as sums, means or token values.

Shapes: B completions, G completions a prompt, T padded length, N packed tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks
from . import autograd
from .linear import Head, check_linear, linear_logprobs
from .token import in_rows, split_temperature

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
    backend: str | None = None,
) -> GroupedLogprobs:
    """Sum or mean over each completion of the log-probs of its tokens.

    Args:
        logits: (B, T, V) padded, or (N, V) packed; float32, bfloat16, float16 or float64.
        targets: (B, T) or (N,), int64; where the mask is 0 they, and the logits, may hold anything.
        mask: (B, T), bool or 0 / 1; padded layout; None: every token counts.
        cu_seqlens: (B + 1,), int32 or int64, 0 first, N last: completion i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]).
        group_size: G, completions a prompt; they stand next to each other and G divides B.
        temperature: a number above 0 or one per token; no gradient.
        reduce: "sum", "mean" (0 for an empty completion) or "none" (token values, 0 where masked).
        return_entropy: also give the entropy, reduced like logp.
        backend: forces one (see r1kernels.backends); None chooses.

    Returns:
        GroupedLogprobs(logp, counts, entropy or None); float32, float64 for float64 logits.

    Raises:
        TypeError, ValueError, IndexError: as ``token_logprobs``; mask together with cu_seqlens; G that does not divide B.

    Precision: as ``token_logprobs``; sums run over the tokens in order, in float32. Deterministic.
    """
    checks.tensor("logits", logits, dtypes=checks.FLOATS, ndim=2 if cu_seqlens is not None else 3)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    checks.tensor("targets", targets, dtypes=(torch.int64,), shape=logits.shape[:-1], like=logits)
    _check_groups(targets, mask, cu_seqlens, group_size, reduce, return_entropy)
    kept, ignored = _masked_targets(targets, mask, logits.shape[-1])
    temperatures, scalar = split_temperature(temperature, kept, ignored)
    arguments = (kept, mask, cu_seqlens, group_size, temperatures, scalar, ignored, reduce, return_entropy)
    return backends.dispatch("grouped_logprobs", backend, logits, *arguments)


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
    backend: str | None = None,
) -> GroupedLogprobs | tuple[GroupedLogprobs, dict[str, Tensor]]:
    """``grouped_logprobs`` from hidden states (B, T, H) or (N, H) and the head, without all logits at once.

    The options are those of ``linear_logprobs`` and ``grouped_logprobs``. A token whose target is ``ignore_index`` does not
    count. With ``stats`` the result is (GroupedLogprobs, {name: token values}).
    """
    check_linear(hidden, weight, targets, bias, softcap, logit_scale)
    checks.integer("ignore_index", ignore_index)
    layout = 2 if cu_seqlens is not None else 3
    if hidden.ndim != layout:
        raise ValueError(f"hidden: expected {layout} dimensions, got shape {tuple(hidden.shape)}")
    _check_groups(targets, mask, cu_seqlens, group_size, reduce, return_entropy)
    kept = targets if mask is None else torch.where(mask != 0, targets, ignore_index)
    head = Head(weight, bias, softcap, logit_scale)
    options = {
        "stats": stats,
        "ignore_index": ignore_index,
        "chunk_size": chunk_size,
        "save_logits": save_logits,
        "batch_invariant": batch_invariant,
        "group": group,
    }
    arguments = (hidden, head, kept, cu_seqlens, group_size, temperature, reduce, return_entropy, options)
    return backends.dispatch("linear_grouped_logprobs", backend, *arguments)


def reference(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    group_size: int,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    reduce: str,
    entropy: bool,
) -> GroupedLogprobs:
    """Plain PyTorch: token log-probs, then sums over each completion."""
    flat = targets.reshape(-1)
    logp, value = autograd.run(
        "reference", in_rows(logits), flat, temperatures, temperature, ignore_index, entropy, False
    )
    counted = (flat != ignore_index).view(targets.shape)
    return _reduced(logp.view(targets.shape), value, counted, cu_seqlens, group_size, reduce, entropy)


def linear_reference(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    group_size: int,
    temperature: float | Tensor,
    reduce: str,
    entropy: bool,
    options: dict[str, Any],
) -> GroupedLogprobs | tuple[GroupedLogprobs, dict[str, Tensor]]:
    """Plain PyTorch: ``linear_logprobs``, then sums over each completion."""
    results = linear_logprobs(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        return_entropy=entropy,
        backend="reference",
        **options,
    )
    results = results if isinstance(results, tuple) else (results,)
    value = results[1] if entropy else None
    counted = targets != options["ignore_index"]
    grouped = _reduced(results[0], value, counted, cu_seqlens, group_size, reduce, entropy)
    return (grouped, results[-1]) if options["stats"] else grouped


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
    checks.integer("group_size", group_size, minimum=1)
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
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != targets.shape[0] or sorted(bounds) != bounds:
                raise ValueError(
                    f"cu_seqlens: expected 0 to N = {targets.shape[0]} in rising order, got {bounds}"
                )
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


def _reduced(
    logp: Tensor,
    entropy: Tensor | None,
    counted: Tensor,
    cu_seqlens: Tensor | None,
    group_size: int,
    reduce: str,
    wants_entropy: bool,
) -> GroupedLogprobs:
    counts = _sums(counted.to(torch.float64), cu_seqlens).to(torch.int64)
    values = [logp] + ([entropy.view(logp.shape)] if wants_entropy and entropy is not None else [])
    if reduce != "none":
        values = [_sums(value, cu_seqlens) for value in values]
        if reduce == "mean":
            values = [value / counts.clamp(min=1) for value in values]
        values = [value.view(-1, group_size) for value in values]
    return GroupedLogprobs(values[0], counts.view(-1, group_size), values[1] if wants_entropy else None)


def _sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum over each completion (B,)."""
    if cu_seqlens is None:
        return values.sum(-1)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.to(torch.int64), initial=0.0)
