"""The run folder: appends cut back to the resume point, whole files or none, and faults told in one line."""

import errno
import json
import os
import resource
import signal

import pytest
import torch

from tests.support.finished import is_done
from training import files
from training.errors import UserError
from training.recipe import load
from training.run_dir import RunDir


@pytest.fixture
def stage(tmp_path):
    stage = RunDir(tmp_path / "run").stage("zero")
    stage.begin({"lr": 1}, {"base": "abc"})
    return stage


def tensors(value):
    return {"weight": torch.full((3, 2), float(value)), "bias": torch.arange(4, dtype=torch.int64) + value}


def test_a_resume_point_gives_back_tensors_counters_and_lengths(stage):
    stage.log(step=1, reward=0.5)
    stage.add_samples([{"text": "ä"}, {"text": "b"}])
    stage.save_state(1, tensors(1), {"seen": 7, "names": ["x"]})
    stage.log(step=2, reward=0.6)
    with (stage.path / "samples.jsonl").open("a") as file:
        file.write('{"text": "half a li')

    again = RunDir(stage.path.parent).stage("zero")
    again.begin({"lr": 1}, {"base": "abc"})
    state = again.load_state()
    assert state.step == 1
    assert state.counters == {"seen": 7, "names": ["x"]}
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors(1).items())
    assert again.metrics() == [{"step": 1, "reward": 0.5}]
    assert again.samples() == [{"text": "ä"}, {"text": "b"}]


def test_the_work_that_a_kill_would_cost_begins_with_the_last_resume_point(stage, monkeypatch):
    now = stage.unsaved_seconds
    monkeypatch.setattr("training.run_dir.time.monotonic", lambda began=stage._saved: began + now + 700)
    assert stage.unsaved_seconds == pytest.approx(now + 700)
    stage.save_state(1, {}, {})
    assert stage.unsaved_seconds == 0


def test_a_piece_is_kept_and_the_lines_of_a_killed_attempt_go(stage):
    files.write_jsonl(stage.piece("one"), [{"text": "kept"}])
    stage.log(step=0)
    assert stage.started() == {"config": {"lr": 1}, "inputs": {"base": "abc"}}
    again = RunDir(stage.path.parent).stage("zero")
    again.begin({"lr": 1}, {"base": "abc"})
    assert files.read_jsonl(again.piece("one")) == [{"text": "kept"}] and again.metrics() == []
    assert again.outputs() == []
    again.finish({})
    assert not again.piece("one").exists()


def test_without_a_resume_point_a_stage_begins_with_an_empty_folder(stage):
    stage.log(step=1)
    stage.write_data("data.jsonl", [{"a": 1}])
    again = RunDir(stage.path.parent).stage("zero")
    again.begin({}, {})
    assert again.load_state() is None
    assert again.metrics() == []
    assert again.outputs() == []


def test_load_state_without_a_resume_point_cuts_the_appended_files_to_nothing(stage):
    stage.log(step=1)
    assert stage.load_state() is None
    assert stage.metrics() == []


def test_tensors_that_share_memory_are_saved_whole(stage):
    whole = torch.arange(6.0).reshape(2, 3)
    stage.save_state(1, {"a": whole, "tied": whole, "view": whole[1], "across": whole.t()}, {})
    state = stage.load_state()
    assert torch.equal(state.tensors["tied"], whole)
    assert torch.equal(state.tensors["view"], whole[1])
    assert torch.equal(state.tensors["across"], whole.t())


@pytest.mark.parametrize(
    ("victim", "damage"),
    [
        ("state.json", "flip"),
        ("state.json", "cut"),
        ("tensors", "flip"),
        ("tensors", "cut"),
        ("metrics.jsonl", "cut"),
    ],
)
def test_a_damaged_resume_point_is_refused_and_named(stage, victim, damage):
    stage.log(step=1, reward=0.5)
    stage.save_state(1, tensors(1), {})
    name = json.loads((stage.path / "state.json").read_text())["tensors"] if victim == "tensors" else victim
    path = stage.path / name
    if victim == "tensors":
        (path,) = path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        stage.load_state()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_older_resume_point_survives_a_write_that_fails(stage, monkeypatch):
    stage.log(step=1)
    stage.save_state(1, tensors(1), {"at": 1})
    stage.log(step=2)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.parallel.saved.save", refuse)
    with pytest.raises(UserError, match=r"state-1.*: no room to write \(.* free"):
        stage.save_state(2, tensors(2), {"at": 2})
    state = stage.load_state()
    assert (state.step, state.counters) == (1, {"at": 1})
    assert torch.equal(state.tensors["weight"], tensors(1)["weight"])
    assert stage.metrics() == [{"step": 1}]


@pytest.mark.parametrize("steps", [(1, 2), (1, 1)])
@pytest.mark.parametrize("moment", range(1, 30))
def test_a_kill_at_any_file_operation_leaves_a_whole_resume_point(stage, monkeypatch, moment, steps):
    """Dies at the n-th rename, fsync or unlink of the second save: one of both states comes back, whole."""
    first, second = steps
    stage.save_state(first, tensors(10), {"save": 1})

    class Killed(BaseException):
        pass

    calls = 0

    def dying(real):
        def wrapper(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Killed
            return real(*arguments, **keywords)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr("training.files.remove", dying(files.remove))
        killed = True
        try:
            stage.save_state(second, tensors(20), {"save": 2})
            killed = False
        except Killed:
            pass
    assert killed == (calls >= moment)
    state = RunDir(stage.path.parent).stage("zero").load_state()
    save = state.counters["save"]
    assert torch.equal(state.tensors["weight"], tensors(10 * save)["weight"])
    if not killed:
        assert save == 2


def test_finish_records_hashes_and_lineage(stage):
    (stage.path / "checkpoint").mkdir()
    (stage.path / "checkpoint" / "config.json").write_text("{}")
    stage.write_data("data.jsonl", [{"a": 1}])
    stage.save_state(3, tensors(1), {})
    stage.log(step=3)
    assert not is_done(stage)
    stage.finish({"accuracy": 0.5})
    record = stage.record()
    assert set(record["outputs"]) == {"checkpoint/config.json", "data.jsonl"}
    assert record["metrics"] == {"accuracy": 0.5}
    lineage = json.loads((stage.path / "lineage.json").read_text())
    assert lineage["inputs"] == {"base": "abc"}
    assert lineage["config"] == {"lr": 1}
    assert lineage["packages"]["torch"] == torch.__version__
    assert not list(stage.path.glob("state*"))
    assert list(stage.checkpoints()) == ["zero"]


def test_done_means_outputs_intact_and_inputs_those_of_the_parents(tmp_path):
    run = RunDir(tmp_path)
    base, zero = run.stage("base"), run.stage("zero")
    base.begin({}, {})
    base.write_data("data.jsonl", [1])
    base.finish({})
    zero.begin({}, {"base": base.record()["hash"]})
    zero.write_data("data.jsonl", [2])
    zero.finish({})
    assert is_done(base)
    assert is_done(zero)

    (zero.path / "data.jsonl").write_text("3\n")
    assert not is_done(zero)
    assert zero.changed_output() == str(zero.path / "data.jsonl")
    (zero.path / "data.jsonl").write_text("2\n")
    assert is_done(zero)

    base.begin({}, {})
    base.write_data("data.jsonl", [9])
    base.finish({})
    assert is_done(base)
    assert not is_done(zero)


def test_missing_and_broken_data_is_named(stage):
    with pytest.raises(UserError, match=r"data\.jsonl is missing: stage zero has not made it"):
        stage.read_data("data.jsonl")
    stage.data("data.jsonl").write_bytes(b'{"a": 1}\n{"a": \n\xff\n')
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: not valid JSON"):
        stage.read_data("data.jsonl")


def test_numbers_of_torch_and_numpy_are_written_as_numbers(stage):
    stage.log(loss=torch.tensor(0.25), count=torch.tensor(3))
    assert stage.metrics() == [{"loss": 0.25, "count": 3}]


def locked_elsewhere(run):
    """Whether another process is refused the lock, and what it is told."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with RunDir(run.path).lock():
                os.write(write, b"mine")
        except UserError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as answer:
        return answer.read()


def test_a_second_process_is_refused_in_one_line(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.lock():
        expected = f"{run.path} is in use by another process (process id {os.getpid()})"
        assert locked_elsewhere(run) == expected
    assert locked_elsewhere(run) == "mine"


def test_a_folder_with_too_long_a_name_is_refused_in_one_line(tmp_path):
    run = RunDir(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match=r"may not be written \(File name too long\)"), run.lock():
        pass


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        RunDir(tmp_path).read_recipe()


def test_the_recipe_of_a_run_is_read_back(tmp_path):
    run = RunDir(tmp_path)
    recipe = load("tiny", ["zero.steps=3"])
    run.write_recipe(recipe)
    assert run.read_recipe() == recipe
    assert run.read_recipe(["seed=4"]).seed == 4


@pytest.fixture
def small_files():
    """Files of this process may not pass 20,000 bytes: a real write that fails, without a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_real_refused_write_leaves_the_old_files(stage, small_files):
    stage.write_data("data.jsonl", [{"a": 1}])
    stage.save_state(1, tensors(1), {})
    big = {"weight": torch.zeros(10_000)}
    for write in (
        lambda: stage.write_data("data.jsonl", ["x" * 30_000]),
        lambda: stage.save_state(2, big, {}),
        lambda: [stage.log(text="x" * 1_000) for _ in range(30)],
    ):
        with pytest.raises(UserError, match="no room to write") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert stage.read_data("data.jsonl") == [{"a": 1}]
    assert stage.load_state().step == 1
    assert stage.metrics() == []
    assert not [path for path in stage.path.iterdir() if "partial" in path.name]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "runs" / "zero").mkdir(parents=True)
    with pytest.raises(UserError, match="expected a file, it is a folder"):
        files.write_text(tmp_path / "runs", "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "zero"]
