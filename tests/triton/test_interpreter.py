"""Runs the interpreted_*.py files beside this one, in a process: the interpreter is chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
# without the repair of bfloat16 that the others make when they are imported, which lasts as long as a process
UNREPAIRED = HERE / "interpreted_as_users_run_it.py"
REPAIRED = sorted(set(HERE.glob("interpreted_*.py")) - {UNREPAIRED})
# two sessions of pytest; without what collects garbage for warnings, which are ignored
SESSIONS = """
import sys, pytest
options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
sys.exit(pytest.main([*options, sys.argv[1]]) or pytest.main([*options, *sys.argv[2:]]))
"""


def test_kernels_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SESSIONS, UNREPAIRED, *REPAIRED],
        cwd=HERE.parents[1],
        # plugins that happen to be installed are not needed, and take longer to load than Triton does
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert len(re.findall(r"\d+ passed", result.stdout)) == 2 and "skipped" not in result.stdout, output
