"""Signs in the metrics of GRPO that there is nothing to learn: each one that lasts is warned of."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from training import notices

PATIENCE = 5  # steps in a row that a sign lasts before it is told


class Sign(NamedTuple):
    """Whether the metrics of a step show it, what a person is told, and after how many such steps in a row."""

    shows: Callable[[Mapping[str, Any]], bool]
    text: str
    patience: int = PATIENCE


SIGNS = {
    "flat_reward": Sign(
        lambda row: row["reward_spread"] == 0,
        "every response earns the same reward, so there is nothing to learn: are the format and the problems within the "
        "model's reach?",
    ),
    "no_spread": Sign(
        lambda row: row["zero_std_groups"] == 1 and row["reward_spread"] > 0,
        "no group has responses of different reward, so there is nothing to learn: the problems are too easy or too hard",
    ),
    "reward_errors": Sign(
        lambda row: row["reward_errors"] > 0,
        "rewards raise or hang, and their responses are left out (metric reward_errors)",
        patience=1,
    ),
}


class Watch:
    """Counts for how many steps each sign lasts.

    earlier: metrics of the steps before, so that a run that goes on warns at the same step as one that was never stopped.
    """

    def __init__(self, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._lasts = dict.fromkeys(SIGNS, 0)
        for row in earlier:
            self._count(row)

    def see(self, row: Mapping[str, Any]) -> None:
        """Count the signs of one step and warn of those that have lasted."""
        self._count(row)
        for kind, sign in SIGNS.items():
            if self._lasts[kind] >= sign.patience:
                error = row.get("reward_error") if kind == "reward_errors" else None
                notices.warn(kind, f"{sign.text}; the most frequent: {error}" if error else sign.text)

    def _count(self, row: Mapping[str, Any]) -> None:
        for kind, sign in SIGNS.items():
            self._lasts[kind] = self._lasts[kind] + 1 if sign.shows(row) else 0
