"""A process for the code of a person, so that a call that hangs or dies costs one answer: rewards and checks of their own."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from training.errors import UserError

IMPORT_SECONDS = 120.0  # for the file and what it imports
MOST_FAULTS = 3  # calls that hang or die, one after the other or in one step; then some are not asked
_ROOT = Path(__file__).parent.parent


class OwnFault(Exception):
    """A call without an answer, and why."""


class OwnProcess:
    """The process, which starts with the first call and again after one that hung or died.

    module: of the trainer, which calls `serve`. spec: "python:<file>:<name>". options: keyword arguments of a class, JSON values.
    seconds: longest time of one call.
    """

    def __init__(
        self, module: str, spec: str, seconds: float, options: Mapping[str, Any] | None = None
    ) -> None:
        self.module, self.spec, self.seconds, self.options = module, spec, seconds, dict(options or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection

    def ask(self, message: Any) -> Any:
        """What the process answers.

        Raises:
            OwnFault: it hung or died, and was ended, or the message cannot be sent.
            UserError: the file cannot be imported.
        """
        self.start()
        try:
            self._pipe.send(message)
            if self._pipe.poll(self.seconds):
                return self._pipe.recv()
            fault = f"it took longer than {self.seconds:g} s"
        except (EOFError, OSError):
            fault = "its process died"
        except Exception as error:  # what cannot be sent, such as an open file in the meta of a problem
            fault = f"{type(error).__name__}: {error}"
        self.close()
        raise OwnFault(fault)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._end()
            self._process = None

    def start(self) -> None:
        """Start the process, where it does not run, and import the file.

        Raises:
            UserError: the file cannot be imported.
        """
        if self._process is not None:
            return
        self._pipe, theirs = Pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONHASHSEED": "0",  # sets have one order in every run, and with them the answers one value
        }
        command = [
            sys.executable,
            "-m",
            self.module,
            str(theirs.fileno()),
            self.spec,
            json.dumps(self.options),
        ]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        self._end = weakref.finalize(self, _kill, self._process)
        theirs.close()
        try:
            fault = self._pipe.recv() if self._pipe.poll(IMPORT_SECONDS) else "its import takes too long"
        except EOFError:
            fault = "its process died while the file was imported"
        if fault:
            self.close()
            raise UserError(fault if self.spec in fault else f"{self.spec}: {fault}")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def serve(make: Callable[[str, dict[str, Any]], Callable[[Any], Any]]) -> None:
    """The other side: answer messages until the pipe is closed. make: spec and options -> what answers a message."""
    pipe, spec, options = Connection(int(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])
    try:
        answer = make(spec, options)
    except UserError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        pipe.send(answer(message))
