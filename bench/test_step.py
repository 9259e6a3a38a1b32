"""Benchmarks of the whole GRPO step of the trainer."""

from typing import Any

import pytest

from bench.cases import Case
from bench.replay import REPLAY, Session, play

FAMILY = "step"


@pytest.mark.benchmark(timer=REPLAY)
def test_step(measured: Session, benchmark: Any, case: Case, peer: str, phase: str) -> None:
    play(measured, benchmark, case, peer, phase)
