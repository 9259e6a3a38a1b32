"""``pytest bench``: every implementation of the quick cases, each timed by pytest-benchmark; --benchmark-disable: a smoke test.

Implementations are timed one after the other. Who compares two reads ``python -m bench run``, which times both in the same
rounds; this is for the features of pytest-benchmark: its groups, its JSON, its comparison with an earlier run.
"""

import functools
from typing import Any

import pytest
import torch

from . import step, timing
from .measure import first_call, judge, release
from .ops import families
from .ops.cases import CASES, Case, tiny
from .ops.numerics import Exact
from .ops.peers import Inputs, Peer
from .results import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = bool(metafunc.config.getoption("benchmark_disable"))
    known = tiny(DEVICE.type) if smoke else [c for c in CASES if c.quick and c.device == DEVICE.type]
    found: list[Any] = []
    for case in known:
        if "peer" in metafunc.fixturenames and case.op in families.OPS:
            peers = families.OPS[case.op].peers_on(case.device, compiles=not smoke)
            found += [pytest.param(case, peer, id=f"{case.id}-{peer.name}") for peer in peers]
        if "backend" in metafunc.fixturenames and case.op == "grpo_step":
            found += [pytest.param(case, name, id=f"{case.id}-{name}") for name in step.BACKENDS]
    metafunc.parametrize(("case", "peer" if "peer" in metafunc.fixturenames else "backend"), found)


@functools.lru_cache(maxsize=1)
def _problem(case: Case) -> tuple[Inputs, dict[str, Exact]]:
    """Inputs and exact results, which the tests of one case share."""
    release()
    return families.OPS[case.op].problem(case, DEVICE)


def test_op(benchmark: Any, case: Case, peer: Peer) -> None:
    """Forward and backward; an implementation whose results are wrong gets no time."""
    inputs, exact = _problem(case)
    row, clock = Row(peer.name, peer.kind), timing.Clock(DEVICE)
    call = first_call(case, peer, row, inputs, exact)
    judge([row], case)
    if row.status != "ok":
        (pytest.fail if row.status == "failed" and peer.kind == "ours" else pytest.skip)(row.reason)
    benchmark.group, benchmark.extra_info["errors"] = case.id, row.errors
    if peer.kind == "floor":
        benchmark(timing.floor, call, clock)
    elif peer.prepare is None:
        benchmark(timing.train, call, inputs, clock)
    else:  # what is prepared stays outside of the clock
        benchmark.pedantic(
            timing.train, setup=lambda: ((call, peer.fresh(inputs), clock), {}), rounds=20, warmup_rounds=1
        )


def test_grpo_step(benchmark: Any, case: Case, backend: str) -> None:
    """A whole step of the trainer."""
    benchmark.group = case.id
    benchmark.pedantic(step.Bench(case).step, (step.BACKENDS[backend],), rounds=3, warmup_rounds=1)
