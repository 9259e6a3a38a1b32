"""A stage of several parts: a kill in the middle repeats no finished part and mixes no resume points."""

from types import SimpleNamespace

import pytest
import torch

from training.context import StageContext
from training.parts import run_parts
from training.progress import Progress
from training.run_dir import StageDir


def context(path):
    stage = StageDir(path)
    stage.begin({}, {})
    return StageContext("stage", SimpleNamespace(seed=0), None, stage, {}, Progress(quiet=True))


def counting(stop_at=None):
    """Work of six steps that keeps a running product; stops by an exception at (part, step)."""
    began = []

    def work(part, name):
        state = part.stage.load_state()
        first, value = (state.step, state.tensors["value"]) if state else (0, torch.ones(1))
        began.append((name, first))
        for step in range(first, 6):
            if (name, step) == stop_at:
                raise KeyboardInterrupt
            value = value * (2.0 if name == "first" else 3.0)
            part.stage.log(step=step, value=value.item())
            if step == 2:
                part.stage.save_state(step + 1, {"value": value}, {})
        return {"value": value.item()}

    return work, began


@pytest.mark.parametrize(
    ("stop_at", "goes_on"),
    [
        (("first", 1), [("first", 0), ("second", 0)]),
        (("first", 4), [("first", 3), ("second", 0)]),
        (("second", 1), [("second", 0)]),
        (("second", 4), [("second", 3)]),
    ],
)
def test_a_killed_stage_ends_as_an_undisturbed_one(tmp_path, stop_at, goes_on):
    whole = context(tmp_path / "whole")
    expected = run_parts(whole, ["first", "second"], counting()[0])
    assert expected == {"first": {"value": 2.0**6}, "second": {"value": 3.0**6}}
    cut = context(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run_parts(cut, ["first", "second"], counting(stop_at)[0])
    work, began = counting()
    assert run_parts(context(tmp_path / "cut"), ["first", "second"], work) == expected
    assert began == goes_on
    assert cut.stage.metrics() == whole.stage.metrics()
    assert {row["part"] for row in cut.stage.metrics()} == {"first", "second"}
