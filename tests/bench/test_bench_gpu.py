"""bench/gpu.sh without a GPU: its steps, what it leaves behind, and that the marks are in what it measures first."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bench import run
from bench.__main__ import main
from bench.ceilings import Ceilings
from bench.gpu import sanitize
from bench.gpu.roofline import MARKS

ROOT = Path(__file__).parents[2]
H200 = Ceilings(4.3e12, {"bfloat16": 790e12, "float32": 50e12}, 1e13)


@pytest.fixture
def gpu_sh(tmp_path):
    """gpu_sh(stub, argument, ...): a dry run whose python is this shell function; the code, what was said, its folder."""

    def call(stub, *arguments):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{stub}\n")
        python.chmod(0o755)
        out = tmp_path / "results"
        command = [
            "bash",
            str(ROOT / "bench/gpu.sh"),
            "--dry-run",
            "--python",
            str(python),
            "--out",
            str(out),
        ]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr, out

    return call


def test_a_step_out_of_time_says_where_it_was_and_its_log_is_in_the_archive(gpu_sh):
    """Python gets Ctrl-C, which has a traceback, not SIGTERM, which has none."""
    program = "import time\ndef where_it_hangs(): time.sleep(60)\nwhere_it_hangs()"
    hang = f"case $* in *pytest*) exec {sys.executable} -S -c '{program}' ;; esac"
    code, said, out = gpu_sh(hang, "--parts", "test", "--families", "moe", "--minutes", "0.16")
    assert code == 1 and "test-moe: out of time" in said
    log = (out / "test-moe.log").read_text()
    assert "KeyboardInterrupt" in log and "where_it_hangs" in log
    with tarfile.open(f"{out}.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"test-moe.log", "steps.txt", "machine.log"} <= names


def test_no_time_is_spent_on_a_build_that_lacks_the_kernels_of_the_gpu(gpu_sh):
    code, said, out = gpu_sh('case $* in *"lease hopper"*) echo no sm_90a; exit 1 ;; esac')
    assert code == 1 and "hopper: failed (1)" in said and "no sm_90a" in said
    assert "smoke" not in said and Path(f"{out}.tar.gz").is_file()


def test_the_steps_come_in_the_order_of_what_they_are_worth(gpu_sh):
    _, _, out = gpu_sh("exit 0", "--minutes", "5")
    steps = [line.partition(":")[0] for line in (out / "steps.txt").read_text().splitlines()]
    steps = [step for step in steps if not step.startswith(("sanitize", "profile"))]
    assert steps == [
        "machine", "build", "built", "hopper", "experts", "smoke", "products", "marks",
        "test-moe", "test-logprob", "test-grpo", "test-step",
        "bench-moe", "bench-logprob", "bench-grpo", "bench-step", "train",
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["experts", "products", "profiled", "hopper"])
def test_what_the_first_lease_asks_runs_on_a_cpu(capsys, what):
    assert main(["lease", what, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said
    if what == "experts":
        assert "ok experts cpu" in said and "same bits" in said


def test_a_quick_run_has_every_mark():
    quick = {case.id for case in run.Plan("cuda", quick=True).cases()[0]}
    assert {mark.case.id for mark in MARKS} <= quick
    assert all(0 < mark.goal(H200) < 0.2 for mark in MARKS)


def test_a_run_without_peers_has_ours_alone():
    case = run.Plan("cpu", ("route",), tiny=True).cases()[0][0]
    assert {row.kind for row in run.rows(case, 0.0, compiles=False, ours=True)} == {"ours"}


def test_sanitizers_see_the_riskiest_kernels_first(monkeypatch):
    """bfloat16 experts, with more tiles than an H200 has multiprocessors, and tiles of many and of few k tiles."""
    seen = []
    monkeypatch.setattr(
        sanitize, "_both_ways", lambda op, args, kwargs: seen.append((op, args[0].dtype, args))
    )
    assert main(["sanitize", "--device", "cpu"]) == 0
    op, dtype, (hidden, indices, _, gate_up, down) = seen[0]
    assert (op, dtype) == ("moe_experts", torch.bfloat16)
    assert hidden.shape[1] >= 512 and indices.numel() >= 20_000
    rows = indices.flatten().bincount(minlength=down.shape[0])
    k_tiles = set((rows // 64).tolist())
    assert 0 in k_tiles and max(k_tiles) > 100 and len(k_tiles) > 3
    row_tiles, column_tiles = -(-rows // 128).sum(), -(-gate_up.shape[1] // 256)
    # a block's second tile reuses its stages
    assert row_tiles * column_tiles > 132 and gate_up.shape[2] // 64 > 4
    dtypes = [dtype for op, dtype, _ in seen if op == "moe_experts"]
    assert dtypes.index(torch.float32) == len(dtypes) // 2
