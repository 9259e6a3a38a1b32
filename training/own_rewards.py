"""Rewards of one's own, such as "python:my_rewards.py:brevity": functions in a file, called in a process of their own.

    def brevity(sample):          # one response: a number, or None to leave it out
        return -len(sample.token_ids) / 1000

    def rank(samples):            # all responses of a step at once: one number or None for each
        ...

The name of the argument, `sample` or `samples` (training.rewards.Sample), says which. An exception, a value that is no
finite number, a call that takes too long and a process that dies give no reward and a reason that begins with "error";
they are counted like those of every reward. After the last two the process is started again. Only the file itself is hashed
into the settings of a stage, not what it imports.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from training import sources
from training.errors import UserError
from training.rewards import Reward, Sample

IMPORT_SECONDS = 120.0  # for the file and what it imports
MOST_FAULTS = 3  # calls that hang or die in one step; the rest of the step is then not asked
_ROOT = Path(__file__).parent.parent


class OwnReward:
    """One reward with its process, which starts with the first call.

    spec: "python:<file>:<function>". seconds: longest time of one call.
    """

    def __init__(self, spec: str, seconds: float) -> None:
        self.spec, self.seconds = spec, seconds
        self._at_once = sources.argument_of(spec) == "samples"
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection

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
            if faults == MOST_FAULTS:
                answer: list[Any] | str = f"not asked after {faults} calls that hung or died"
            else:
                answer = self._ask(call)
                faults += isinstance(answer, str)
            found += [
                self._reward(value) for value in ([answer] * len(call) if isinstance(answer, str) else answer)
            ]
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _reward(self, value: float | str | None) -> Reward:
        if isinstance(value, str):
            return Reward(None, f"error: {value}")
        return Reward(value, "left out" if value is None else f"by {self.spec.rpartition(':')[2]}")

    def _ask(self, call: list[Sample]) -> list[Any] | str:
        """What the process says to one call, a value for each sample; text where it hung or died, and then it is ended."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send(call)
            if self._pipe.poll(self.seconds):
                answer: list[Any] = self._pipe.recv()
                return answer
            fault = f"it took longer than {self.seconds:g} s"
        except (EOFError, OSError):
            fault = "its process died"
        except Exception as error:  # a sample that cannot be sent, such as one with an open file in its meta
            fault = f"{type(error).__name__}: {error}"
        self.close()
        return fault

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONHASHSEED": "0",  # sets have one order in every run, and with them the rewards one value
        }
        command = [sys.executable, "-m", "training.own_rewards", str(theirs.fileno()), self.spec]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        try:
            fault = self._pipe.recv() if self._pipe.poll(IMPORT_SECONDS) else "its import takes too long"
        except EOFError:
            fault = "its process died while the file was imported"
        if fault:
            self.close()
            raise UserError(fault if self.spec in fault else f"{self.spec}: {fault}")


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


def serve(pipe: Connection, spec: str) -> None:
    """The other side: answer calls until the pipe is closed."""
    try:
        function = sources.load(spec)
    except UserError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    at_once = sources.argument_of(spec) == "samples"
    while True:
        try:
            samples = pipe.recv()
        except EOFError:
            return
        try:
            values = list(function(samples)) if at_once else [function(sample) for sample in samples]
            if len(values) != len(samples):
                raise ValueError(f"expected {len(samples)} rewards, one for each sample, got {len(values)}")
            answer = [_number(value) for value in values]
        except Exception as error:
            answer = [f"{type(error).__name__}: {error}"] * len(samples)
        pipe.send(answer)


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
    serve(Connection(int(sys.argv[1])), sys.argv[2])
