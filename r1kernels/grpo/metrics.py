"""What grpo_loss measures: one small tensor on the device of the loss, read through a mapping of names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = (
    "loss",
    "policy_loss",
    "kl",
    "entropy",
    "ratio/mean",
    "ratio/max",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "approx_kl",
    "ess",
    "num_tokens",
    "num_impossible",
)
"""What stands at each place of the tensor."""


class Metrics(Mapping[str, Tensor]):
    """Named 0-d views of one tensor; nothing is copied to the host before ``floats`` or a caller's ``.item()``.

    ``tensor`` holds a value for every name of ``NAMES``; the mapping shows those that the call measured.
    """

    def __init__(self, tensor: Tensor, names: tuple[str, ...]) -> None:
        self.tensor = tensor
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.tensor[NAMES.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self.names)})"

    def floats(self) -> dict[str, float]:
        """All metrics as Python numbers: one copy to the host, and the only synchronisation."""
        values = self.tensor.tolist()
        return {name: values[NAMES.index(name)] for name in self.names}


def measured_names(kl: bool, entropy: bool, clip: bool) -> tuple[str, ...]:
    """The names of what a call measures that was given a reference (kl) and entropies, and whose variant has a clip."""
    return _MEASURED[kl, entropy, clip]


def _names_without(*hidden: str) -> tuple[str, ...]:
    return tuple(name for name in NAMES if not name.startswith(hidden))


_MEASURED = {
    (kl, entropy, clip): _names_without(
        *(() if kl else ("kl",)), *(() if entropy else ("entropy",)), *(() if clip else ("clip_ratio/",))
    )
    for kl, entropy, clip in itertools.product((False, True), repeat=3)
}


class GRPOOutput(NamedTuple):
    """What ``grpo_loss`` and ``linear_grpo_loss`` return."""

    loss: Tensor
    metrics: Metrics


class Measured(NamedTuple):
    """What the metrics are made of; one value per token and without gradient, but for the two scalars."""

    loss: Tensor
    policy_loss: Tensor
    kl: Tensor | None
    entropy: Tensor | None
    ratio: Tensor
    approx_kl: Tensor
    impossible: Tensor
    clipped: tuple[Tensor, Tensor] | None
    """(from below, from above), bool; None where the variant has no clip."""


def measure(
    measured: Measured, mask: Tensor, ratios: tuple[Tensor, Tensor], kls: tuple[Tensor, Tensor]
) -> Metrics:
    """The metrics of one call.

    ``ratios`` are the tokens in the means over ratios and clips, and the weight of each there: 1, or 1 / length where the ratio is
    one value per sequence (then a sequence counts once, as in TRL); ``kls`` the same for the KL.
    """
    of_ratio, units = ratios
    tokens = mask.to(units.dtype)
    zero = units.new_zeros(())
    low, high = measured.clipped or (mask & ~mask, mask & ~mask)
    kl = zero if measured.kl is None else _mean(measured.kl, *kls)
    entropy = zero if measured.entropy is None else _mean(measured.entropy, mask, tokens)
    values = {
        "loss": measured.loss,
        "policy_loss": measured.policy_loss,
        "kl": kl,
        "entropy": entropy,
        "ratio/mean": _mean(measured.ratio, of_ratio, units),
        "ratio/max": _largest(measured.ratio, of_ratio),
        "clip_ratio/low_mean": _mean(low.to(units.dtype), mask, units),
        "clip_ratio/high_mean": _mean(high.to(units.dtype), mask, units),
        "clip_ratio/region_mean": _mean((low | high).to(units.dtype), mask, units),
        "approx_kl": _mean(measured.approx_kl, mask, tokens),
        "ess": _effective_share(measured.ratio, of_ratio, units),
        "num_tokens": tokens.sum(),
        "num_impossible": measured.impossible.to(units.dtype).sum(),
    }
    names = measured_names(
        measured.kl is not None, measured.entropy is not None, measured.clipped is not None
    )
    return Metrics(torch.stack([values[name] for name in NAMES]), names)


def _mean(values: Tensor, mask: Tensor, units: Tensor) -> Tensor:
    """The mean over the counted tokens, weighted by ``units``; 0 where nothing counts."""
    total = units.sum()
    return torch.where(mask, values * units, 0.0).sum() / torch.where(total > 0, total, 1.0)


def _largest(values: Tensor, mask: Tensor) -> Tensor:
    """The largest of values that are at least 0; 0 where nothing counts."""
    kept = torch.where(mask, values, 0.0)
    return kept.amax() if kept.numel() else kept.sum()


def _effective_share(ratio: Tensor, mask: Tensor, units: Tensor) -> Tensor:
    """Effective sample size of the ratios over their number: (sum c)^2 / (n sum c^2), 1 on policy; 0 where nothing counts."""
    largest = _largest(ratio, mask)
    # Relative to the largest one, so that no square overflows.
    relative = torch.where(mask, ratio, 0.0) / torch.where(largest > 0, largest, 1.0)
    squares = (units * relative.square()).sum() * units.sum()
    return (units * relative).sum().square() / torch.where(squares > 0, squares, 1.0)
