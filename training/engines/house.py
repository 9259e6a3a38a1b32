"""Where engines keep files and a server between calls: for the length of a stage, then all of it goes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from training import files

if TYPE_CHECKING:
    from training.engines.server import Server

WEIGHTS = "rollout-weights"
LOG = "vllm.log"


@dataclass
class House:
    """folder: of the run. server: the one that was started last, and `serves` says for which model and settings."""

    folder: Path
    server: Server | None = None
    serves: str = field(default="")

    @property
    def weights(self) -> Path:
        """The folder that a server reads weights from."""
        return self.folder / WEIGHTS

    @property
    def log(self) -> Path:
        """The file that a server which is started here writes to."""
        return self.folder / LOG

    def stop(self) -> None:
        """Stops the server that was started here, if there is one."""
        if self.server is not None:
            self.server.stop()
        self.server, self.serves = None, ""


_house: ContextVar[House | None] = ContextVar("house", default=None)


@contextmanager
def housed(folder: Path) -> Iterator[None]:
    """Inside the block engines keep what a server needs in `folder`; at its end their server is stopped and the weights are removed."""
    house = House(folder)
    token = _house.set(house)
    try:
        yield
    finally:
        _house.reset(token)
        house.stop()
        files.remove(house.weights)


@contextmanager
def current_house() -> Iterator[House]:
    """The house of the stage that runs; outside of every stage, one in a temporary folder, for the length of the block."""
    house = _house.get()
    if house is not None:
        yield house
        return
    with tempfile.TemporaryDirectory(prefix="rollout-") as folder, housed(Path(folder)):
        made = _house.get()
        assert made is not None
        yield made
