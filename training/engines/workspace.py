"""Where engines keep files and a server between calls: for the length of a stage, then all of it is removed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from training import files
from training.parallel import ranks

if TYPE_CHECKING:
    from training.engines.server import Server

WEIGHTS = "rollout-weights"
LOG = "vllm.log"


@dataclass
class Workspace:
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


_workspace: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


@contextmanager
def workspace_in(folder: Path) -> Iterator[None]:
    """Inside the block engines keep what a server needs in `folder`; at its end their server is stopped and the weights are removed."""
    workspace = Workspace(folder)
    token = _workspace.set(workspace)
    try:
        yield
    finally:
        _workspace.reset(token)
        workspace.stop()
        if ranks.main():
            files.remove(workspace.weights)


@contextmanager
def current_workspace() -> Iterator[Workspace]:
    """The workspace of the stage that runs; outside of every stage, one in a temporary folder, for the length of the block."""
    workspace = _workspace.get()
    if workspace is not None:
        yield workspace
        return
    with tempfile.TemporaryDirectory(prefix="rollout-") as folder, workspace_in(Path(folder)):
        made = _workspace.get()
        assert made is not None
        yield made
