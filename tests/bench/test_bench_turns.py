"""Turns: a short call is made several times and its first call told apart, a long one once, by one rule for everyone.

A machine with a clock of its own stands in for the real one: a call takes longer when something else ran before it.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from bench import guard, measure, report, timing, turns
from bench.ceilings import Ceilings
from bench.environment import environment
from bench.ops import families
from bench.ops.cases import Case
from bench.ops.numerics import Exact
from bench.ops.peers import Inputs, Op, Peer
from bench.results import Measured, Run

CASE = Case("route", "cpu", "float32", {"T": 64, "E": 8, "K": 2})
CEILINGS = Ceilings(1e12, {"float32": 1e12, "bfloat16": 1e12}, 1e12)
MILLI = 1e-3


class Machine:
    """Seconds that pass only in calls; ``work`` is cold where another name worked before."""

    def __init__(self):
        self.now, self.last, self.made = 0.0, None, []

    def perf_counter(self):
        return self.now

    def work(self, name, cold, warm):
        self.now += warm if self.last == name else cold
        self.last = name
        self.made.append(name)


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    for module in (timing, measure):
        monkeypatch.setattr(module, "time", found)
    return found


def implementation(machine, name, cold, warm, kind="peer"):
    """Doubles x; a call takes so many milliseconds."""

    def make(case, inputs):
        def call(inputs):
            machine.work(name, MILLI * cold, MILLI * warm)
            return {"y": inputs["x"] * 2}

        return call

    return Peer(name, make, kind)


@pytest.fixture
def measured(machine, monkeypatch):
    """A case of these implementations."""

    def rows(*peers, effort=1.0):
        def inputs(case, device):
            return Inputs({"x": torch.ones(3)}, ("x",), {"y": torch.ones(3)})

        def exact(case, inputs):
            return {name: Exact(torch.full((3,), 2.0, dtype=torch.float64)) for name in ("y", "d x")}

        ours = SimpleNamespace(backend=lambda case, inputs: "cpu", forced=lambda device: ())
        monkeypatch.setitem(families.OPS, "route", Op(ours, inputs, exact, peers))
        return Measured(CASE, measure.measure(CASE, effort), [0.0, 0.0], [1.0, 1.0])

    return rows


@pytest.fixture
def case(machine, measured):
    return measured(
        implementation(machine, "eager PyTorch", 5.0, 2.0),
        implementation(machine, "r1kernels", 4.0, 1.0, "ours"),
        implementation(machine, "long", 40.0, 30.0),
    )


@pytest.mark.parametrize("phase", ["inference", "forward+backward"])
def test_first_calls_are_told_apart_from_those_after_them(case, phase):
    for name, cold, warm in (("eager PyTorch", 5.0, 2.0), ("r1kernels", 4.0, 1.0)):
        row = case.named(name)
        assert len(row.rounds[phase]) >= 5
        assert row.rounds[phase] == pytest.approx([MILLI * warm] * len(row.rounds[phase]))
        assert row.firsts[phase] == pytest.approx([MILLI * cold] * len(row.rounds[phase]))
        assert (row.median(phase), row.median(phase, first=True)) == pytest.approx(
            (MILLI * warm, MILLI * cold)
        )
    eager = case.eager
    assert (eager.over_ours(phase), eager.over_ours(phase, first=True)) == pytest.approx((2.0, 1.25))


def test_everybody_calls_until_the_turn_is_long_enough(case):
    # the first call and as many as last 10 ms together
    calls = {row.peer: row.calls for row in case.rows}
    assert calls["eager PyTorch"] == {"inference": 6, "forward+backward": 6}
    assert calls["r1kernels"] == {"inference": 11, "forward+backward": 11}


def test_a_long_call_is_a_turn_of_its_own(case):
    row = case.named("long")
    assert row.calls == {} and row.firsts == {}
    assert row.rounds["forward+backward"] == pytest.approx([0.04] * len(row.rounds["inference"]))
    # the only call of a turn is its first
    assert row.median("forward+backward", first=True) == row.median("forward+backward")


def test_the_name_and_the_place_of_an_implementation_do_not_matter(machine, measured):
    found = measured(
        implementation(machine, "r1kernels", 4.0, 1.0, "ours"),
        implementation(machine, "one", 4.0, 1.0),
        implementation(machine, "eager PyTorch", 4.0, 1.0),
    )
    first, *others = found.rows
    for other in others:
        assert other.calls == first.calls
        for its, expected in ((other.rounds, first.rounds), (other.firsts, first.firsts)):
            assert {name: pytest.approx(values) for name, values in expected.items()} == its


def test_turns_stay_within_the_effort_and_keep_two_forms_of_a_kernel_apart(machine, measured):
    names = ("eager PyTorch", "ours", "ours in another form", "a", "b")
    peers = [implementation(machine, name, 2.0, 1.0) for name in names]
    measured(*peers, effort=1.0)
    assert machine.now < 1.2
    order = [
        name for name, before in zip(machine.made, [None, *machine.made], strict=False) if name != before
    ]
    timed = order[order.index("b") + 1 :]
    assert all(set(timed[at : at + 5]) == set(names) for at in range(0, len(timed), 5))
    assert {"ours", "ours in another form"} not in [set(pair) for pair in pairwise(timed)]


# --- one turn ---


def calling(*seconds):
    """A call that takes these seconds one after another, the last of them forever."""
    left = list(seconds)
    return lambda: {"forward": 0.0, "forward+backward": left.pop(0) if len(left) > 1 else left[0]}


def test_an_interruption_makes_no_short_call_a_long_one():
    for seconds in ((0.05, 0.001), (0.002, 0.05, 0.001)):
        turn = turns.take(calling(*seconds))
        assert turn.cold["forward+backward"] == seconds[0]
        assert turn.samples["forward+backward"] == 0.001 and turn.calls >= 11


def test_a_call_that_is_surely_long_is_made_once():
    turn = turns.take(calling(0.2, 99.0))
    assert (turn.samples["forward+backward"], turn.cold, turn.calls) == (0.2, {}, 1)


def test_later_turns_make_as_many_calls_as_the_first():
    turn = turns.take(calling(0.3, 0.1, 0.2, 0.3, 99.0), calls=4)
    assert turn.samples["forward+backward"] == 0.2 and turn.calls == 4
    assert turns.take(calling(0.3, 99.0), calls=1).samples["forward+backward"] == 0.3


def test_calls_that_no_clock_can_see_come_to_an_end():
    assert turns.take(calling(0.0)).calls > 100


# --- who uses them ---


def test_the_guard_takes_the_calls_after_the_first(machine, measured, monkeypatch):
    measured(implementation(machine, "r1kernels", 4.0, 1.0, "ours"))
    clock_of = {"forward": lambda: machine.work("yardstick", 3 * MILLI, MILLI), "backward": lambda: None}
    monkeypatch.setattr(guard, "_yardstick", lambda case, inputs, peers: clock_of)
    found = guard._shortest(CASE)
    assert found["forward"] == pytest.approx((MILLI, MILLI))


def run_of(case):
    return Run(environment("cpu"), CEILINGS, "2026-01-01", True, [case])


def test_reports_show_both_and_say_what_they_are(case):
    found = run_of(case)
    (line,) = report.headline(found).rows
    assert line[3:9] == ["1", "eager PyTorch", "2", "2.0x", "1.25x", "2.0x"]
    for text in (report.page(found), report.document(found)):
        assert "A call shorter than 10 ms is made several times in a turn" in text
    table = report.case_table(found, case)
    place = list(table.head).index("first call, ms")
    assert [row[place] for row in table.rows] == ["5", "4", "40"]
    assert "eager PyTorch 6, r1kernels 11." in table.note


def test_reports_of_long_calls_say_nothing_of_first_calls(machine, measured):
    found = run_of(measured(implementation(machine, "r1kernels", 40.0, 30.0, "ours")))
    assert report.FIRST not in report.page(found) + report.document(found)


def test_whoever_loses_only_the_first_call_is_told(machine, measured):
    found = run_of(
        measured(
            implementation(machine, "eager PyTorch", 3.0, 2.0),
            implementation(machine, "r1kernels", 4.0, 1.0, "ours"),
        )
    )
    lines = report.not_best(found)
    assert len(lines) == 2 and all("first call: eager PyTorch takes 0.75x" in line for line in lines)
