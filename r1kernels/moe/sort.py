"""sort_by_expert: the order in which a grouped GEMM wants its rows.

T tokens, E experts, K experts per token, S = T * K routed rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..op import Contiguous, Kernel, Op
from . import reference

MOST_ROWS = 2**31 - 1  # that kernels count


class ExpertOrder(NamedTuple):
    """What ``sort_by_expert`` returns, for S flattened indices.

    Example: indices [[1, 0], [1, 3]] with 3 experts (3 is the sentinel) give offsets [0, 1, 3, 3],
    permutation [1, 0, 2, 3] and inverse [1, 0, 2, 3].

    offsets: (E + 1,) int32; the rows of expert e are offsets[e] to offsets[e + 1], sentinel rows follow offsets[E].
    permutation: (S,) int64; sorted row r is the flattened index permutation[r] (token permutation[r] // K).
    inverse: (S,) int64; the flattened index s lies in sorted row inverse[s].
    """

    offsets: Tensor
    permutation: Tensor
    inverse: Tensor


def sort_by_expert(indices: Tensor, num_experts: int) -> ExpertOrder:
    """Order routed rows by expert: a stable counting sort.

    Args:
        indices: int64, any shape, row-major: for each routed row its expert in [0, num_experts), or ``num_experts``, the
            sentinel of expert parallelism (a row that another rank computes); sentinels come last.
        num_experts: E, at least 1.

    Returns:
        ExpertOrder(offsets, permutation, inverse).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or size.
        IndexError: an index outside [0, num_experts] (on the CPU; on CUDA it counts as a sentinel unless
            ``debug_checks(True)``).

    Deterministic; rows of one expert keep their order.
    """
    checks.tensor("indices", indices, dtypes=(torch.int64,))
    num_experts = checks.integer("num_experts", num_experts, minimum=1)
    if checks.values_visible(indices):
        checks.in_range("indices", indices, 0, num_experts, allow=num_experts)
    return ExpertOrder(*SORT_BY_EXPERT(None, SortCall(indices.reshape(-1), num_experts)))


class SortCall(NamedTuple):
    indices: Contiguous  # (S,)
    experts: int


def _shapes(call: SortCall) -> tuple[Tensor, Tensor, Tensor]:
    offsets = call.indices.new_empty(call.experts + 1, dtype=torch.int32)
    return offsets, torch.empty_like(call.indices), torch.empty_like(call.indices)


FORWARD = Kernel("sort_by_expert", SortCall, _shapes)


def too_many(rows: int) -> tuple[str, ...]:
    """Why kernels cannot serve so many routed rows."""
    return (
        () if rows <= MOST_ROWS else (f"{rows} routed rows are more than the {MOST_ROWS} that kernels count",)
    )


SORT_BY_EXPERT = Op(
    "sort_by_expert",
    reference.sort_by_expert,
    FORWARD,
    decides="indices",
    dtypes=(torch.int64,),
    limits=lambda backend, call: too_many(call.indices.numel()),
)


def check_ascending(name: str, offsets: Tensor, high: int) -> None:
    """Raise ValueError unless ``offsets`` ascends from at least 0 to at most ``high``. Needs visible values."""
    before = 0
    for position, entry in enumerate(offsets.tolist()):
        if not before <= entry <= high:
            raise ValueError(
                f"{name}: expected ascending values in [0, {high}], got {entry} at position {position}"
            )
        before = entry
