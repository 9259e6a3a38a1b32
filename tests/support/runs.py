"""Work and commands in processes of their own, killed or not, and every number that a run wrote."""

import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE = 1800  # seconds until a subprocess is given up


def start(command, stdout=subprocess.DEVNULL):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_to_the_end(command):
    process = start(command)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err


def wait_for(due):
    end = time.monotonic() + DEADLINE
    while not due():
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.002)


def run_and_kill(command, due):
    """Starts the command and kills it with SIGKILL once `due()`; returns whether it was still running."""
    process = start(command)
    wait_for(lambda: due() or process.poll() is not None)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == (-signal.SIGKILL if running else 0)
    return running


def exit_code(work, due=None):
    """Of a process, forked from this one, that does `work`, to the end or until `due()`: then it is killed."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    if due is not None:
        wait_for(lambda: due() or not child.is_alive())
        child.kill()
    child.join()
    return child.exitcode


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def without_times(value):
    if isinstance(value, dict):
        return {
            key: without_times(entry)
            for key, entry in value.items()
            if not key.endswith(("_seconds", "_per_second"))
        }
    if isinstance(value, list):
        return [without_times(entry) for entry in value]
    return value


def numbers(run):
    """Every number a run wrote: all JSONL files line by line, final metrics, and the hash of every output."""
    found = {}
    for path in sorted(run.rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(run))] = [without_times(row) for row in rows]
    for path in sorted(run.glob("*/done.json")):
        record = json.loads(path.read_text())
        found[str(path.relative_to(run))] = [
            record["hash"],
            record["outputs"],
            without_times(record["metrics"]),
        ]
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, f"{name} differs"
