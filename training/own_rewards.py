"""Rewards of one's own, such as "python:my_rewards.py:brevity": functions in a file, called in a process of their own.

    def brevity(sample):          # one response: a number, or None to leave it out
        return -len(sample.token_ids) / 1000

    def rank(samples):            # all responses of a step at once: one number or None for each
        ...

The name of the argument, `sample` or `samples` (training.rewards.Sample), says which. An exception, a value that is no
finite number, a call that takes too long and a process that dies give no reward and a reason that begins with "error";
they are counted like those of every reward. After the last two the process is started again.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from training import sources
from training.own_process import MOST_FAULTS, OwnFault, OwnProcess, serve
from training.rewards import Reward, Sample


class OwnReward:
    """One reward with its process, which starts with the first call.

    spec: "python:<file>:<function>". seconds: longest time of one call.
    """

    def __init__(self, spec: str, seconds: float) -> None:
        self.spec = spec
        self._at_once = sources.argument_of(spec) == "samples"
        self.process = OwnProcess(__name__, spec, seconds)

    def __call__(self, samples: Sequence[Sample]) -> list[Reward]:
        """The rewards of all samples, in order. A reward that is given all at once gets those of all ranks.

        Raises:
            UserError: the file cannot be imported.
        """
        # here alone: it imports torch, which would take the other process longer than its work
        from training.parallel import ranks

        return ranks.together(self._rewards, samples) if self._at_once else self._rewards(samples)

    def _rewards(self, samples: Sequence[Sample]) -> list[Reward]:
        found: list[Reward] = []
        faults = 0
        for call in [list(samples)] if self._at_once else [[sample] for sample in samples]:
            values: list[float | str | None]
            if faults == MOST_FAULTS:
                values = [f"not asked after {faults} calls that hung or died"] * len(call)
            else:
                try:
                    values = self.process.ask(call)
                except OwnFault as fault:
                    values = [str(fault)] * len(call)
                    faults += 1
            found += [self._reward(value) for value in values]
        return found

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def _reward(self, value: float | str | None) -> Reward:
        if isinstance(value, str):
            return Reward(None, f"error: {value}")
        return Reward(value, "left out" if value is None else f"by {self.spec.rpartition(':')[2]}")


@contextmanager
def own_rewards(terms: Mapping[str, float], seconds: float) -> Iterator[dict[str, OwnReward]]:
    """The rewards of one's own among the terms of a recipe, by name; their processes end with the block."""
    made = {
        name: OwnReward(name, seconds)
        for name, weight in terms.items()
        if weight and name.startswith(sources.PYTHON)
    }
    try:
        yield made
    finally:
        for reward in made.values():
            reward.close()


def _answering(spec: str, options: Mapping[str, Any]) -> Callable[[list[Sample]], list[float | str | None]]:
    """In the process: samples -> a value for each, text where there is none."""
    function = sources.load(spec)
    at_once = sources.argument_of(spec) == "samples"

    def answer(samples: list[Sample]) -> list[float | str | None]:
        try:
            values = list(function(samples)) if at_once else [function(sample) for sample in samples]
            if len(values) != len(samples):
                raise ValueError(f"expected {len(samples)} rewards, one for each sample, got {len(values)}")
            return [_number(value) for value in values]
        except Exception as error:
            return [f"{type(error).__name__}: {error}"] * len(samples)

    return answer


def _number(value: Any) -> float | str | None:
    """A reward as it is sent: a finite number, None, or what is wrong with it."""
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and (isinstance(value, str) or not math.isfinite(number)):
        return f"expected a finite number or None, got {value!r:.60}"
    return number


if __name__ == "__main__":
    serve(_answering)
