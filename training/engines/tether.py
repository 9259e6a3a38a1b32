"""Runs a command for as long as someone holds the other end of its stdin: `python tether.py COMMAND ...`.

However the holder ends, by an error, Ctrl-C or a kill, the pipe closes with it: then the command is asked to end, and
after a while it and everything that it has started is killed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

PATIENCE = 20.0  # seconds that the command has to end


def main() -> int:
    """Runs the command of the arguments in a session of its own and returns its exit code."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def release() -> None:
        while os.read(0, 4096):  # until its end; a lock of sys.stdin would outlast main
            pass
        child.terminate()
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            _kill(child.pid)

    threading.Thread(target=release, daemon=True).start()
    code = child.wait()
    _kill(child.pid)  # workers that outlived it
    return code


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
