"""group_advantages: from the rewards of a group of answers to their advantages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, devices
from ..op import Contiguous, Float32, Kernel, Op
from . import reference
from .casts import numbers_tensor
from .reference import SCALES

DEFAULT_EPS = 1e-4
_REWARDS = (*checks.FLOATS, torch.int64, torch.int32, torch.bool)


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    valid: Tensor | None = None,
    scale: str = "group",
    eps: float = DEFAULT_EPS,
    leave_one_out: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How much better each answer is than the others to the same question.

    ============= ======================================================== ================
    scale         advantage                                                source
    ============= ======================================================== ================
    "group"       (reward - group mean) / (group std + eps)                GRPO, DeepSeek-R1
    "batch"       (reward - group mean) / (std of all valid rewards + eps) REINFORCE++
    "none"        reward - group mean                                      Dr. GRPO
    leave_one_out reward - mean of the other rewards of the group          RLOO
    ============= ======================================================== ================

    std is the unbiased one. Entries that are not valid enter no mean and no std and get 0. A group with fewer than two
    valid entries, or whose valid rewards are all equal, gets exactly 0.

    Args:
        rewards: (B,), floating point, integer or bool.
        group_size: B is a multiple of it and each run of ``group_size`` entries is a group. Either this or ``group_ids``.
        group_ids: int64 (B,), any numbers, in any order: equal ids are a group.
        valid: bool (B,); default: all.
        scale: a name of the table.
        eps: at least 0; used by "group" and "batch".
        leave_one_out: see the table; ``scale`` and ``eps`` stay at their defaults then.
        backend: the name of a backend: that one or an error; None chooses (see r1kernels.backends).

    Returns:
        advantages (B,), float32 (float64 for float64 rewards), without gradient.

    Raises:
        ValueError: an unknown scale, an argument that is not used, a wrong shape, and, where values are checked (on the
            CPU in eager mode, or with ``debug_checks(True)``), a valid reward that is NaN or infinite; elsewhere it
            makes its group NaN.
        TypeError: a wrong type or dtype.

    Precision: float64 inside. Deterministic (the reference on CUDA up to the order of float64 sums). Kernels serve
    float32, bfloat16, float16 and bool rewards, the reference the others too.
    """
    checks.tensor("rewards", rewards, dtypes=_REWARDS, ndim=1)
    _check_groups(rewards, group_size, group_ids)
    if valid is not None:
        checks.tensor("valid", valid, dtypes=(torch.bool,), shape=tuple(rewards.shape), like=rewards)
    checks.choice("scale", scale, SCALES)
    if checks.number("eps", eps) < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if checks.boolean("leave_one_out", leave_one_out) and scale == "batch":
        raise ValueError("scale: not used with leave_one_out, got 'batch'")
    if eps != DEFAULT_EPS and (leave_one_out or scale == "none"):
        raise ValueError(
            f"eps: not used {'with leave_one_out' if leave_one_out else 'by scale none'}, got {eps}"
        )
    if checks.values_visible(rewards, valid):
        bad = ~torch.isfinite(rewards) if valid is None else ~torch.isfinite(rewards) & valid
        if bool(bad.any()):
            (position,) = checks.first_bad(bad)
            raise ValueError(
                f"rewards: expected finite numbers, got {float(rewards[position])} at position {position}"
            )
    number = numbers_tensor((eps,), torch.float64)
    call = AdvantagesCall(
        rewards, group_size or 0, group_ids, valid, SCALES.index(scale), number, leave_one_out
    )
    return GROUP_ADVANTAGES(backend, call)


def _check_groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
    if (group_size is None) == (group_ids is None):
        given = "neither" if group_size is None else "both"
        raise ValueError(f"group_size: expected either group_size or group_ids, got {given}")
    if group_ids is not None:
        checks.tensor("group_ids", group_ids, dtypes=(torch.int64,), shape=tuple(rewards.shape), like=rewards)
    elif rewards.shape[0] % checks.integer("group_size", group_size, 1) != 0:
        raise ValueError(
            f"group_size: expected a divisor of the {rewards.shape[0]} rewards, got {group_size}"
        )


class AdvantagesCall(NamedTuple):
    rewards: Float32
    group_size: int  # of runs that are the groups; 0: group_ids say which those are
    group_ids: Contiguous | None
    valid: Contiguous | None
    scale: int  # the place in SCALES
    eps: Tensor  # float64 (1,) on the CPU
    leave_one_out: bool


def _shapes(call: AdvantagesCall) -> Tensor:
    return torch.empty_like(call.rewards)


FORWARD = Kernel("group_advantages", AdvantagesCall, _shapes)


GROUP_ADVANTAGES = Op(
    "group_advantages",
    reference.group_advantages,
    FORWARD,
    decides="rewards",
    dtypes=(*devices.FLOATS, torch.bool),
)
