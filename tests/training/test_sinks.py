"""Sinks: what a run logs arrives in each library, a resumed stage continues its runs, and a sink that fails stops nothing."""

import json
import shutil
import struct

import pytest

from training import notices, sinks
from training.check import check
from training.errors import UserError
from training.pipeline import Stage
from training.pipeline import run as run_pipeline
from training.progress import Progress
from training.recipe import load
from training.run_dir import RunDir

ROWS = [{"step": step, "loss": 2.0 - step, "reward_error": "text", "half_seconds": 0.5} for step in range(3)]


def log(recipe, stage, rows):
    """A stage that logs rows, as a run of the pipeline has it."""
    stage.begin({}, {})
    stage.load_state()
    with sinks.listening(recipe, stage.path):
        for row in rows:
            stage.log(**row)


@pytest.fixture
def stage(tmp_path):
    return RunDir(tmp_path / "my-run").stage("zero")


def recipe(*names):
    return load("smoke", [f"sinks=[{', '.join(names)}]"])


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_number_under_its_step(stage):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    log(recipe("tensorboard"), stage, ROWS)
    found = scalars(stage.path.parent / "tensorboard" / "zero")
    assert found == {"loss": [(0, 2.0), (1, 1.0), (2, 0.0)], "half_seconds": [(0, 0.5), (1, 0.5), (2, 0.5)]}
    assert stage.metrics() == ROWS


def test_a_resumed_stage_takes_back_what_the_killed_one_wrote_after_its_resume_point(stage):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    stage.begin({}, {})
    with sinks.listening(recipe("tensorboard"), stage.path):
        stage.log(**ROWS[0])
        stage.save_state(1, {}, {})
        stage.log(step=1, loss=77.0)
    log(recipe("tensorboard"), stage, ROWS[1:])
    assert scalars(stage.path.parent / "tensorboard" / "zero")["loss"] == [(0, 2.0), (1, 1.0), (2, 0.0)]


def test_each_part_of_a_stage_is_a_run_of_its_own(stage):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    log(recipe("tensorboard"), stage, [{"part": part, "step": 0, "loss": 1.0} for part in ("qwen2", "llama")])
    assert sorted(each.name for each in (stage.path.parent / "tensorboard").iterdir()) == [
        "zero-llama",
        "zero-qwen2",
    ]


def test_trackio_continues_the_run_of_a_resumed_stage(stage, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    from trackio.sqlite_storage import SQLiteStorage

    project = recipe().name
    stage.begin({}, {})
    with sinks.listening(recipe("trackio"), stage.path):
        stage.log(**ROWS[0])
        stage.save_state(1, {}, {})
    log(recipe("trackio"), stage, ROWS[1:])
    (name,) = [each for each in SQLiteStorage.get_runs(project) if each.startswith("my-run-zero-")]
    logged = SQLiteStorage.get_logs(project, name)
    assert [(row["step"], row["loss"]) for row in logged] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    trackio.delete_project(project, force=True)


def records(data):
    """The records of a file of W&B: LevelDB's log, blocks of 32 KiB behind a header of 7 bytes."""
    at, held = 7, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:  # the rest of a block is empty
            at += 32768 - at % 32768
            continue
        held += data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            yield held
            held = b""
        at += 7 + length
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768


def test_wandb_writes_an_offline_run(stage):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    from wandb.proto import wandb_internal_pb2

    for _ in range(3):
        shutil.rmtree(stage.path.parent, ignore_errors=True)
        log(recipe("wandb"), stage, ROWS)
        (file,) = (stage.path.parent / "wandb").glob("offline-run-*/run-*.wandb")
        if file.stat().st_size > 7:
            break
    else:
        pytest.skip("W&B's own process wrote nothing but a header, three times: no record to read")
    rows = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append((json.loads(items["step"]), json.loads(items["loss"])))
    assert rows == [(0, 2.0), (1, 1.0), (2, 0.0)]


def test_a_stage_that_is_done_again_has_new_ids(stage):
    log(recipe("tensorboard"), stage, ROWS[:1])
    first = json.loads((stage.path / sinks.IDS).read_text())
    assert stage.outputs() == []  # ids are no output
    shutil.rmtree(stage.path)
    log(recipe("tensorboard"), stage, ROWS[:1])
    assert json.loads((stage.path / sinks.IDS).read_text()) != first


def test_a_sink_that_fails_is_warned_of_once_and_the_others_go_on(stage, monkeypatch):
    heard = []

    class Full:
        def __init__(self, track):
            self.track = track

        def log(self, step, metrics):
            raise OSError("no room")

        def close(self):
            raise AssertionError("it is gone")

    class Good(Full):
        def log(self, step, metrics):
            heard.append((self.track.name, step, metrics))

        def close(self):
            heard.append("closed")

    monkeypatch.setattr(sinks, "SINKS", {"tensorboard": Full, "trackio": Good})
    warnings = []
    with notices.listening(lambda kind, text: warnings.append(text)):
        log(recipe("tensorboard", "trackio"), stage, ROWS[:2])
    assert warnings == ["tensorboard gets no more metrics: OSError: no room"]
    assert heard == [
        ("zero", 0, {"loss": 2.0, "half_seconds": 0.5}),
        ("zero", 1, {"loss": 1.0, "half_seconds": 0.5}),
        "closed",
    ]


def test_a_missing_package_is_one_line_before_the_first_stage(monkeypatch):
    monkeypatch.setattr("training.optional.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^sinks: wandb needs the package wandb: pip install wandb$"):
        check(recipe("wandb"), data=False)


def test_the_pipeline_gives_a_stage_its_sinks(tmp_path, monkeypatch):
    seen = []

    class Heard:
        def __init__(self, track):
            seen.append((track.folder.name, track.name, track.recipe.name))

        def log(self, step, metrics):
            seen.append(metrics)

        def close(self):
            pass

    class OneStage(Stage):
        def run(self, context):
            context.stage.log(step=0, loss=1.0)
            return {}

    monkeypatch.setattr(sinks, "SINKS", {"tensorboard": Heard})
    chosen = load("smoke", ["sinks=[tensorboard]", "stages=[base]"])
    stages = {"base": OneStage("t", lambda recipe: (), "")}
    run_pipeline(chosen, RunDir(tmp_path / "r"), progress=Progress(quiet=True), stages=stages)
    assert seen == [("r", "base", "smoke"), {"loss": 1.0}]
