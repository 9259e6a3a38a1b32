"""The arguments that the log-prob ops share: checked, and as kernels take them.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast, checks
from .divergence_terms import KINDS


class Head(NamedTuple):
    """How hidden states become logits: softcap(logit_scale * (hidden @ weight.T + bias)), softcap(z) = c tanh(z / c)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def check_logits(logits: Tensor, ndim: int | None = None) -> None:
    checks.tensor("logits", logits, dtypes=checks.FLOATS, ndim=ndim)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")


def check_memory(chunk_size: int | None, save_logits: bool | None = None) -> int:
    """Check what says how much memory an op takes; ``chunk_size``, or 0 where it is to be chosen."""
    if save_logits is not None:
        checks.boolean("save_logits", save_logits)
    return 0 if chunk_size is None else checks.integer("chunk_size", chunk_size, minimum=1)


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    whose: str = "",
    several: bool = False,
) -> tuple[Tensor, Head]:
    """Check the arguments that all ops on hidden states and a head share, and cast them as autocast those of F.linear.

    ``whose``: what stands before their names in errors. ``several``: the targets may be K of each token (..., K).
    """
    checks.tensor(f"{whose}hidden", hidden, dtypes=checks.FLOATS)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{whose}hidden: expected shape (..., H) with H >= 1, got {tuple(hidden.shape)}")
    checks.tensor(f"{whose}weight", weight, dtypes=checks.FLOATS, shape=(None, hidden.shape[-1]), like=hidden)
    if weight.shape[0] == 0:
        raise ValueError(f"{whose}weight: expected shape (V, H) with V >= 1, got {tuple(weight.shape)}")
    if not several:
        checks.tensor("targets", targets, dtypes=(torch.int64,), shape=hidden.shape[:-1], like=hidden)
    else:
        check_targets(targets, hidden.shape[:-1], hidden)
    if bias is not None:
        checks.tensor(f"{whose}bias", bias, dtypes=checks.FLOATS, shape=(weight.shape[0],), like=hidden)
    hidden, weight, bias = autocast.cast(hidden, weight, bias)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{whose}{name}: expected the dtype of {whose}hidden, {hidden.dtype}, got {value.dtype}"
            )
    if softcap is not None:
        softcap = checks.positive(f"{whose}softcap", softcap)
    logit_scale = checks.number(f"{whose}logit_scale", logit_scale)
    return hidden, Head(weight, bias, softcap, logit_scale)


def check_kind(kind: str, beta: float) -> float:
    """Check which divergence is asked for; ``beta`` of a Jensen-Shannon divergence, the teacher's share of the mixture."""
    checks.choice("kind", kind, KINDS)
    beta = checks.number("beta", beta)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f'beta: expected a number inside (0, 1), got {beta}: use kind="forward_kl" for 0 and kind="reverse_kl" for 1'
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    return beta


def check_targets(targets: Tensor, shape: torch.Size, like: Tensor) -> bool:
    """Check targets of tokens of this shape (...), one (...) or K (..., K) of each; whether they are K."""
    several = isinstance(targets, Tensor) and targets.ndim == len(shape) + 1
    wanted = (*shape, None) if several else shape
    checks.tensor("targets", targets, dtypes=(torch.int64,), shape=wanted, like=like)
    if several and targets.shape[-1] == 0:
        raise ValueError(f"targets: expected shape (..., K) with K >= 1, got {tuple(targets.shape)}")
    return several


def refuse_for_several(**given: bool) -> None:
    """Raise ValueError at the first option that is given and does not go together with K targets per token."""
    for name, there in given.items():
        if there:
            raise ValueError(f"{name}: expected none together with K targets per token")


def split_temperature(
    temperature: float | Tensor,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    name: str = "temperature",
) -> tuple[Tensor | None, float]:
    """A temperature as (one per token (N,) or None, the number that holds for all), checked; dtype: that of the inputs."""
    # of a number nothing is looked at
    counted = targets != ignore_index if isinstance(temperature, Tensor) else None
    checked = check_temperature(temperature, targets, counted, dtype, name)
    return (checked.reshape(-1), 1.0) if isinstance(checked, Tensor) else (None, checked)


def check_temperature(
    temperature: float | Tensor,
    targets: Tensor,
    counted: Tensor | None,
    dtype: torch.dtype,
    name: str = "temperature",
) -> float | Tensor:
    """A number that holds for all tokens, or one per token in the shape of ``targets``, in float32 (float64 for that dtype).

    What stands where ``counted`` (...) is False is not looked at; None: everything counts.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        number = float(checks.positive(name, temperature))
        if not torch.compiler.is_compiling() or number == 1.0:
            return number
        # an op takes a number for a constant of the graph, which another temperature would compile once more
        return torch.ones(targets.shape, dtype=wide, device=targets.device) * number
    if temperature.ndim == 0:
        checks.tensor(name, temperature, dtypes=checks.FLOATS)
        temperature = temperature.to(targets.device).expand(targets.shape)
    checks.tensor(name, temperature, dtypes=checks.FLOATS, shape=targets.shape, like=targets)
    if temperature.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it")
    if checks.values_visible(temperature, counted):
        looked_at = temperature if counted is None else torch.where(counted, temperature, 1.0)
        checks.all_positive(name, looked_at)
    return temperature.to(wide)


def in_rows(logits: Tensor) -> Tensor:
    """logits (..., V) as (B, T, V), without a copy where the strides allow it (slices like ``logits[:, :-1]`` do)."""
    if logits.ndim == 3:
        return logits
    if logits.ndim < 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits.flatten(0, -3)


def why_not_overwritable(logits: Tensor) -> str:
    """Why a gradient must not be written over the logits, as the end of an error; empty if it may."""
    if logits.requires_grad and logits.is_leaf:
        return "that are not a leaf, got a leaf that requires a gradient"
    if logits.requires_grad and logits._base is not None and logits._base.is_leaf:
        return "that are not a leaf, got a view of one that requires a gradient"
    if checks.overlaps(logits):
        return f"without overlap, got strides {logits.stride()} for shape {tuple(logits.shape)}"
    return ""
