"""The static model of the kernels for GPUs: what it predicts for each mark stands in docs/gpu.md, and is called a prediction."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.gpu import roofline
from bench.gpu.roofline import H200, MARKS, Launch

ROOT = Path(__file__).parents[2]


def seconds(mark, chip=H200):
    return sum(launch.seconds for launch in roofline.launches(chip, mark))


def test_the_table_of_the_page_is_that_of_the_model():
    page = (ROOT / "docs/gpu.md").read_text()
    assert roofline.table().markdown() in page
    assert "uncalibrated" in roofline.table().markdown()


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: f"{mark.case.op} {mark.phase}")
def test_no_prediction_is_below_what_the_work_takes(mark):
    """The floor of the benchmarks, by the ceilings of the same chip; a part of the backward may be kept from the forward."""
    floor, _ = H200.ceilings.floors(mark.case)[mark.phase]
    assert floor <= seconds(mark)
    assert mark.work.flops / seconds(mark) < H200.flops


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: f"{mark.case.op} {mark.phase}")
def test_a_better_chip_is_no_slower(mark):
    better = dataclasses.replace(
        H200, memory=2 * H200.memory, l2=2 * H200.l2, flops=2 * H200.flops, clock=2 * H200.clock, launch=0.0
    )
    assert seconds(mark, better) < seconds(mark)


def test_a_tile_by_hand(monkeypatch):
    """One round of one k tile a multiprocessor: its products, and behind them so many instructions of eight warps."""
    monkeypatch.setattr(roofline, "epilogue", lambda kernel: 1700)
    chip = dataclasses.replace(H200, clock=1e9, l2=1e30, memory=1e30, flops=132 * 2 * 128 * 256 * 64 * 1e6)
    launch = roofline.tiles(chip, "x", "kernel", 132, 1, 0.0, 0.0)
    assert launch.seconds == pytest.approx(1e-6 + 1700 * 8 / 4 * 1e-9)
    assert launch.binding == "epilogue's instructions"
    assert roofline.tiles(chip, "x", "kernel", 133, 1, 0.0, 0.0).seconds == pytest.approx(2 * launch.seconds)


def test_parts_of_a_stage_overlap_and_stages_follow_each_other():
    launch = Launch("x", ({"a": 1.0, "b": 3.0}, {"c": 2.0}))
    assert launch.seconds == 5.0 and launch.binding == "b"
