"""What a call costs beside its work: every op is timed, in processes of its own."""

import pytest

from bench.studies import overhead
from r1kernels import backends


@pytest.fixture(scope="module")
def times():
    (found,) = overhead.in_turns([overhead.ROOT], rounds=1, batches=1)
    return found


def test_every_op_is_timed_and_with_its_backward_where_it_has_one(times):
    assert set(times) == set(backends.ops())
    without = {op for op, phases in times.items() if "forward+backward" not in phases}
    assert without == {
        "decode_attention",
        "group_advantages",
        "sample_tokens",
        "sort_by_expert",
        "update_router_bias",
    }
    assert all(0 < seconds < 1 for phases in times.values() for seconds in phases.values())


def test_the_table_shows_the_difference_to_another_checkout(times, monkeypatch):
    before = {op: {phase: 2 * seconds for phase, seconds in phases.items()} for op, phases in times.items()}
    monkeypatch.setattr(overhead, "in_turns", lambda *arguments: [times, before])
    (table,) = overhead.tables(overhead.measure([], overhead.ROOT, 1))
    shown = {op: cells for op, *cells in table.rows}
    assert set(shown) == set(times)
    seconds = 1e6 * times["route"]["inference"]
    assert f"{seconds:.2f} ({-seconds:+.2f})" in shown["route"]
