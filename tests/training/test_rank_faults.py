"""Ranks that fail, are killed or hang: one message, and no one waits for ever."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.runs import DEADLINE, assert_same, lines, numbers, start, wait_for
from training import pipeline
from training.check import check
from training.cli import main
from training.errors import UserError
from training.parallel import launch, ranks
from training.pipeline import Stage
from training.recipe import load
from training.run_dir import RunDir

PATIENCE = 60  # seconds that forked ranks may take


def ranks_of_main(folder, work, *words):
    """Exit code and standard error of two forked ranks of a command whose stage base does `work(context)`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    (folder / "mine.yaml").write_text("stages: [base]\n")
    children = [os.fork() or _rank(folder, rank, work, meeting, words) for rank in range(2)]
    codes, end = {}, time.monotonic() + PATIENCE
    while len(codes) < 2 and time.monotonic() < end:
        for rank in {0, 1} - codes.keys():
            child, status = os.waitpid(children[rank], os.WNOHANG)
            if child:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for rank in {0, 1} - codes.keys():
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
    assert len(codes) == 2, f"hangs: {codes}"
    return [(codes[rank], (folder / f"{rank}.err").read_text()) for rank in range(2)]


def _rank(folder, rank, work, meeting, words):
    code = 99
    with contextlib.suppress(BaseException), (folder / f"{rank}.err").open("w") as err:
        os.environ |= {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        sys.stdout = sys.stderr = err
        launch.PATIENCE = 1.0
        sys.modules["work_of_ranks"] = SimpleNamespace(run=work)
        pipeline.STAGES["base"] = Stage("work", lambda recipe: (), "work_of_ranks")
        try:
            code = main(["run", str(folder / "mine.yaml"), "--run", str(folder / "run"), *words])
        except SystemExit as error:
            code = error.code
        except Exception as error:
            print(f"traceback of {error!r}", file=sys.stderr)
            code = 1
    os._exit(code)


def said(text):
    return [line for line in text.splitlines() if line.startswith(("error: ", "traceback"))]


def test_a_mistake_that_every_rank_meets_is_told_once(tmp_path):
    def work(context):
        raise UserError("the same for all")

    found = ranks_of_main(tmp_path, work)
    assert [code for code, _ in found] == [2, 2]
    assert [line for _, text in found for line in said(text)] == ["error: the same for all"]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_fails_alone_is_the_one_that_speaks(tmp_path, bad):
    def work(context):
        if ranks.rank() == bad:
            raise UserError("only here") if bad else ValueError("a bug")
        return ranks.gather({"never": 1})[0]

    found = ranks_of_main(tmp_path, work)
    assert found[bad][0] == (2 if bad else 1)
    assert found[1 - bad][0] == launch.OTHER
    told = "error: only here" if bad else "traceback of ValueError('a bug')"
    assert [line for _, text in found for line in said(text)] == [told]


def test_a_rank_that_hangs_is_given_up(tmp_path):
    def work(context):
        if ranks.rank() == 1:
            time.sleep(6)
        return ranks.gather({"late": 1})[0]

    found = ranks_of_main(tmp_path, work, "parallel.timeout=2")
    message = (
        "error: rank 0 waited 2 s for another one (parallel.timeout): it hangs, or has more to do than that"
    )
    assert found[0][0] == 2 and said(found[0][1]) == [message]


def test_a_run_in_use_is_told_once_and_stops_all(tmp_path):
    with RunDir(tmp_path / "run").lock():
        found = ranks_of_main(tmp_path, lambda context: {})
    assert [code for code, _ in found] == [2, launch.OTHER]
    (told,) = [line for _, text in found for line in said(text)]
    assert "is in use by another process" in told


def test_who_was_killed_is_named_by_who_started_them(capsys):
    assert launch._told({0: -signal.SIGTERM, 1: -signal.SIGKILL, 2: launch.OTHER}) == 1
    assert capsys.readouterr().err == (
        "error: rank 1 was ended by SIGKILL; the same command goes on from the last resume point\n"
    )
    assert launch._told({0: launch.OTHER, 1: 2}) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 1),
        (["parallel.processes=4", "parallel.shard=2"], 4),
        (["parallel.processes=4", "parallel.shard=2", "parallel.replicate=2"], 4),
        (["parallel.processes=0", "threads=1000"], 1),
        (["parallel.processes=0", "parallel.shard=3", "threads=1000"], 3),
    ],
)
def test_how_many_processes_a_recipe_asks_for(words, count):
    assert launch.processes(load("tiny", ["device=cpu", *words])) == count


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.processes=3", "parallel.shard=2"], "any number x 2, got 3"),
        (["parallel.processes=4", "parallel.replicate=3"], "3 x 1, got 4"),
    ],
)
def test_processes_that_make_no_layout_are_refused(words, said):
    with pytest.raises(UserError, match=f"expected parallel.replicate x parallel.shard = {said}"):
        launch.processes(load("tiny", words))
    with pytest.raises(UserError, match=r"parallel\.shard: expected 1 with model\.lora"):
        check(load("tiny", ["parallel.shard=2", "model.lora.rank=4"]), data=False)


# --- whole runs ---


def command(folder, *words):
    return [sys.executable, "-m", "training", "run", "smoke", "--run-dir", str(folder), *words]


def begin(words):
    return start(words, stdout=subprocess.PIPE)


def ranks_of(process):
    """Process id of every rank of a command, by its number."""
    found = {}
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_text().split("\0")
            number = next((each.partition("=")[2] for each in environment if each.startswith("RANK=")), None)
            if number is not None:
                found[int(number)] = int(child)
    return found


def runs(process_id):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_smoke_on_two_ranks_killed_here_and_there_ends_with_the_same_numbers(tmp_path):
    two = "parallel.processes=2"
    whole = begin(command(tmp_path / "whole", two))
    out, err = whole.communicate(timeout=DEADLINE)
    assert whole.returncode == 0, err
    assert "2 processes" in out and out.count("the report is") == 1
    run = tmp_path / "killed"
    kills = {"base": (1, "metrics.jsonl", 120), "zero": (0, "metrics.jsonl", 3), "cold_start": (1, "started.json", 1),
             "judge": (0, "metrics.jsonl", 10), "rl_all": (1, "metrics.jsonl", 3), "distill": (0, "parts/qwen2/metrics.jsonl", 8)}  # fmt: skip
    for stage, (rank, file, count) in kills.items():
        process = begin(command(run, two))
        due = functools.partial(lambda path, count: lines(path) >= count, run / stage / file, count)
        if file == "started.json":
            due = (run / stage / file).is_file
        wait_for(lambda due=due, process=process: due() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        os.kill(ranks_of(process)[rank], signal.SIGKILL)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        told = re.findall("^error: .*", err, re.MULTILINE)
        assert told == [
            f"error: rank {rank} was ended by SIGKILL; the same command goes on from the last resume point"
        ]
        if stage == "zero":  # of which one process makes the rest in the copy
            subprocess.run(["cp", "-r", run, tmp_path / "one"], check=True)
    process = begin(command(run, two))
    assert process.communicate(timeout=DEADLINE) and process.returncode == 0
    assert_same(numbers(run), numbers(tmp_path / "whole"))
    process = begin([*command(tmp_path / "one", "parallel.processes=1"), "stages=[base,zero]"])
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    assert "warning: parallel.processes = 2 and now it is 1: what follows may differ" in out
    before = [row["reward"] for row in _rows(tmp_path / "whole/zero/metrics.jsonl")]
    after = [row["reward"] for row in _rows(tmp_path / "one/zero/metrics.jsonl")]
    assert after == pytest.approx(before, abs=0.1)


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_torchrun_from_outside_and_the_death_of_who_started_the_ranks(tmp_path):
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *command(tmp_path / "run")[1:],
    ]
    process = begin([*words, "stages=[base]"])
    wait_for(lambda: lines(tmp_path / "run/base/metrics.jsonl") >= 5 or process.poll() is not None)
    children = ranks_of(process).values()
    assert len(children) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(runs, children)))
    again = begin([*words, "stages=[base]"])
    out, err = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0 and "2 processes" in out, err
