"""What a person sees while a stage runs: a title, a bar with the reward first, and single lines.

On a terminal the bar is tqdm's; elsewhere (a log file, a pipe) a line is printed at every tenth of the way.
"""

import io
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm  # type: ignore[import-untyped]

LOSS_NOTE = "note: the GRPO loss is near 0 by construction (advantages sum to 0); watch the reward"


class Bar:
    """One progress bar; a context manager. `advance` moves it and shows values, the reward before all others."""

    def __init__(self, total: int, start: int, title: str, out: TextIO) -> None:
        self.total, self.title, self.count, self.out = total, title, start, out
        self._began = time.monotonic()
        self._printed = start * 10 // max(total, 1)
        self._tqdm = None
        if out.isatty():
            self._tqdm = tqdm(
                total=total, initial=start, desc=title, file=out, dynamic_ncols=True, leave=True
            )

    def advance(self, count: int = 1, **values: float) -> None:
        """Moves the bar by `count` and shows `values`, named as in metrics.jsonl ("reward", "loss", ...)."""
        self.count += count
        shown = ordered(values)
        if self._tqdm is not None:
            self._tqdm.set_postfix_str(shown, refresh=False)
            self._tqdm.update(count)
            return
        tenth = self.count * 10 // max(self.total, 1)
        if tenth > self._printed:
            self._printed = tenth
            seconds = time.monotonic() - self._began
            print(
                f"{self.title} {self.count}/{self.total} [{seconds:.0f} s] {shown}".rstrip(),
                file=self.out,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tqdm is not None:
            self._tqdm.close()


class Progress:
    """Where a run shows how far it is; `quiet` shows nothing."""

    def __init__(self, out: TextIO | None = None, quiet: bool = False) -> None:
        self.out = out or sys.stdout
        self.quiet = quiet
        self._noted = False

    def say(self, text: str = "") -> None:
        """Prints one line, above a bar where one is shown."""
        if not self.quiet:
            tqdm.write(text, file=self.out)
            self.out.flush()

    def bar(self, total: int, start: int = 0, title: str = "") -> Bar:
        """A bar of `total` steps of which `start` are already done; use it in a `with` statement."""
        return Bar(total, start, title, io.StringIO() if self.quiet else self.out)

    def grpo_bar(self, total: int, start: int = 0, title: str = "") -> Bar:
        """A bar for GRPO: the first one of a run says why its loss is near 0."""
        if not self._noted:
            self._noted = True
            self.say(LOSS_NOTE)
        return self.bar(total, start, title)


def ordered(values: dict[str, float]) -> str:
    """ "reward=1.25 accuracy=0.6 loss=0.001": the reward first, its terms next, then the rest as given."""

    def rank(name: str) -> int:
        return 0 if name == "reward" else 1 if name.startswith("reward/") else 2

    return " ".join(f"{name}={values[name]:.4g}" for name in sorted(values, key=rank))
