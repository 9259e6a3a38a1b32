"""Runs the interpreted_*.py files beside this one, in two processes: the interpreter is chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
# without the repair of bfloat16 that the others make, which lasts as long as a process
UNREPAIRED = HERE / "interpreted_as_users_run_it.py"
REPAIRED = sorted(set(HERE.glob("interpreted_*.py")) - {UNREPAIRED})
PROCESSES = {"unrepaired": [UNREPAIRED], "repaired": REPAIRED}


@pytest.mark.parametrize("files", PROCESSES.values(), ids=PROCESSES)
def test_kernels_in_the_interpreter(files):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(
        [*command, *map(str, files)],
        cwd=HERE.parents[1],
        # plugins that happen to be installed are not needed, and take longer to load than Triton does
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and "skipped" not in result.stdout, output
