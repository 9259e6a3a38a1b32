"""`make setup` compiles for the GPUs of the machine, as `make -n` tells."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").is_file(),
    reason="there is no make or no Makefile",
)


def commands(folder, *arguments, smi=""):
    """What make would run in a clean copy, beside an nvidia-smi that prints `smi`."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{smi}\n")
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("R1KERNELS_", "MAKE"))}
    return subprocess.run(
        ["make", "-n", f"VENV={folder}/venv", *arguments],
        cwd=ROOT,
        env={**kept, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(
    ("smi", "wanted", "headers"),
    [
        ("exit 127", "OFF", False),
        ("echo NVIDIA-SMI has failed; exit 9", "OFF", False),
        ("echo 8.9; echo 8.9", "AUTO 89", False),
        ("echo 9.0; echo 12.0", "AUTO 120 90", True),
    ],
)
def test_setup_compiles_for_the_gpus_that_are_there(tmp_path, smi, wanted, headers):
    text = commands(tmp_path, "setup", smi=smi)
    assert f'echo "{wanted}' in text
    assert ("nvidia-cutlass" in text) == headers


def test_all_tests_and_who_asks_get_the_kernels_of_every_gpu(tmp_path):
    assert 'echo "AUTO "' in commands(tmp_path, "test-all", smi="exit 127")
    assert 'echo "ON "' in commands(tmp_path, "setup", "R1KERNELS_CUDA=ON", smi="echo 9.0")
