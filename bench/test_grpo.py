"""Benchmarks of the GRPO losses."""

from typing import Any

import pytest

from bench.cases import Case
from bench.replay import REPLAY, Session, play

FAMILY = "grpo"


@pytest.mark.benchmark(timer=REPLAY)
def test_grpo(measured: Session, benchmark: Any, case: Case, peer: str, phase: str) -> None:
    play(measured, benchmark, case, peer, phase)
