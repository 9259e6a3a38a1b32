"""Runs programs in processes that have imported torch and nothing else: forks of one, since its import takes seconds."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import r1kernels

HERE = Path(r1kernels.__file__).parents[1]
# a child leaves the loop; to take down what torch imports would cost each a second, and copy its memory
FORKS = """
import gc, json, os, sys, traceback, torch
gc.freeze()
for line in sys.stdin:
    program, path, environment, *files = json.loads(line)
    if os.fork() == 0:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    os._exit(0)
for number, file in enumerate((os.devnull, *files)):
    os.dup2(os.open(file, os.O_RDWR), number)
os.environ.clear()
os.environ.update(environment)
sys.path.insert(0, path)
status = 1
try:
    exec(program)
    status = 0
except SystemExit as end:
    status = int(end.code or 0)
except BaseException:
    traceback.print_exc()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""


def run(
    program: str, environment: Mapping[str, str] = os.environ, path: Path = HERE
) -> subprocess.CompletedProcess:
    """What a Python program says, and its exit status. Modules are first looked for in ``path``.

    What torch reads from the environment at import it has read before.
    """
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        request = (program, str(path), dict(environment), stdout.name, stderr.name)
        process = server()
        print(json.dumps(request), file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        return subprocess.CompletedProcess(program, status, stdout.read(), stderr.read())


@functools.cache
def server() -> subprocess.Popen:
    # -S: no .pth file is read, so that an editable install of r1kernels does not answer for what a path lacks
    paths = sysconfig.get_path("purelib"), sysconfig.get_path("platlib")
    environment, pipe = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, subprocess.PIPE
    command = [sys.executable, "-S", "-c", FORKS]
    process = subprocess.Popen(command, env=environment, cwd="/", stdin=pipe, stdout=pipe, text=True)
    atexit.register(process.communicate)
    return process
