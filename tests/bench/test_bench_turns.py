"""Turns: a short call is made several times and its first call told apart, a long one once, by one rule for everyone.

A machine with a clock of its own stands in for the real one: a call takes longer when something else ran before it.
"""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from bench import compare, families, guard, measure, results, run, timing, turns
from bench.cases import Case, smallest
from bench.ceilings import Ceilings
from bench.measure import Effort
from bench.numerics import Exact
from bench.peers import Inputs, Peer
from bench.report import markdown, page, tables

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


def implementation(machine, name, cold, warm, kind="peer", tiny=None):
    """Doubles x; a call takes so many milliseconds, at the smallest shape ``tiny``."""

    def make(case, inputs):
        times = (tiny, tiny) if case == smallest(case) else (cold, warm)

        def call(inputs):
            machine.work(name, *(MILLI * value for value in times))
            return {"y": inputs["x"] * 2}

        return call

    return Peer(name, make, kind)


@pytest.fixture
def measured(machine, monkeypatch):
    """Rows of these implementations, by name, as a results file holds them."""

    def rows(*peers, effort=1.0):
        def inputs(case, device):
            return Inputs({"x": torch.ones(3)}, ("x",), {"y": torch.ones(3)})

        def exact(case, inputs):
            return {name: Exact(torch.full((3,), 2.0, dtype=torch.float64)) for name in ("y", "d x")}

        ours = SimpleNamespace(backend=lambda case, inputs: "cpu", forced=lambda device: ())
        monkeypatch.setitem(families.OPS, "route", families.Op(ours, inputs, exact, peers))
        found = measure.measure(CASE, Effort(effort), progress=lambda text: None)
        return json.loads(json.dumps(results.case_record(CASE, found, CEILINGS, (0.0, 0.0))))

    return rows


@pytest.fixture
def case(machine, measured):
    return measured(
        implementation(machine, "eager PyTorch", 5.0, 2.0),
        implementation(machine, "r1kernels", 4.0, 1.0, "ours", tiny=0.25),
        implementation(machine, "long", 40.0, 30.0),
    )


@pytest.mark.parametrize("phase", ["inference", "forward+backward"])
def test_first_calls_are_told_apart_from_those_after_them(case, phase):
    for name, cold, warm in (("eager PyTorch", 5.0, 2.0), ("r1kernels", 4.0, 1.0)):
        row = results.named(case, name)
        assert row["samples"][phase] == pytest.approx([MILLI * warm] * len(row["samples"][phase]))
        assert row["cold"][phase] == pytest.approx([MILLI * cold] * len(row["samples"][phase]))
    eager, ours = results.named(case, "eager PyTorch"), results.named(case, "r1kernels")
    assert results.ratio(eager, ours, phase) == pytest.approx(2.0)
    firsts = (results.of_first_calls(row) for row in (eager, ours))
    assert results.ratio(*firsts, phase) == pytest.approx(1.25)


def test_everybody_calls_until_the_turn_is_long_enough(case):
    # the first call and as many as last 10 ms together
    calls = {row["peer"]: row["calls"] for row in case["rows"]}
    assert calls["eager PyTorch"] == {"inference": 6, "forward+backward": 6}
    assert calls["r1kernels"] == {"inference": 11, "forward+backward": 11}


def test_a_long_call_is_a_turn_of_its_own(case):
    row = results.named(case, "long")
    assert row["calls"] == {"inference": 1, "forward+backward": 1} and row["cold"] == {}
    assert row["samples"]["forward+backward"] == pytest.approx([0.04] * len(row["samples"]["inference"]))
    # the only call of a turn is its first
    assert results.of_first_calls(row)["samples"] == row["samples"]


def test_the_name_and_the_place_of_an_implementation_do_not_matter(machine, measured):
    found = measured(
        implementation(machine, "r1kernels", 4.0, 1.0, "ours", tiny=0.25),
        implementation(machine, "one", 4.0, 1.0),
        implementation(machine, "eager PyTorch", 4.0, 1.0),
    )
    first, *others = [{key: row[key] for key in ("samples", "cold", "calls")} for row in found["rows"]]
    for other in others:
        assert other["calls"] == first["calls"]
        for kind in ("samples", "cold"):
            assert {name: pytest.approx(values) for name, values in first[kind].items()} == other[kind]


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


def test_the_overhead_is_what_ours_takes_at_a_tiny_shape(case):
    assert results.main_row(case)["overhead"]["forward+backward"] == pytest.approx(0.25 * MILLI)
    assert "At a tiny shape a call of ours takes 0.25 ms, more than the" in tables.case_table(case).note


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
    measured(implementation(machine, "r1kernels", 4.0, 1.0, "ours", tiny=0.25))
    clock_of = {"forward": lambda: machine.work("yardstick", 3 * MILLI, MILLI), "backward": lambda: None}
    monkeypatch.setattr(
        guard, "_yardstick", lambda case, inputs, peers: lambda clock: timing.floor(clock_of, clock)
    )
    ours, its = guard._shortest(CASE)
    assert ours["forward"] == pytest.approx(MILLI) and its["forward"] == pytest.approx(MILLI)


def record_of(case):
    record = run.begin("cpu", True, CEILINGS, [])
    record["cases"].append({**case, "noise": [1.0, 1.0]})
    return json.loads(json.dumps(record))


def test_reports_show_both_and_say_what_they_are(case):
    record = record_of(case)
    line, cold = tables.headline(record).rows
    assert [cell.text for cell in line[3:8]] == ["1", "eager PyTorch", "2", "2.0x", "2.0x"]
    assert [cell.text for cell in cold[1:8]] == [
        tables.FIRST_CALL, "", "4", "eager PyTorch", "5", "1.25x", "1.25x"
    ]  # fmt: skip
    for text in (page.page(record), markdown.document(record)):
        assert "A call shorter than 10 ms is made several times in a turn" in text
    every = [row[0].text for row in tables.case_table(case).rows]
    assert every.count(tables.FIRST_CALL) == len(case["rows"])
    assert "eager PyTorch 6, r1kernels 11." in tables.case_table(case).note


def test_reports_of_long_calls_say_nothing_of_first_calls(machine, measured):
    record = record_of(measured(implementation(machine, "r1kernels", 40.0, 30.0, "ours", tiny=1.0)))
    assert tables.FIRST_CALL not in page.page(record) + markdown.document(record) + markdown.terminal(record)


def test_whoever_loses_only_the_first_call_is_told(machine, measured):
    record = record_of(
        measured(
            implementation(machine, "eager PyTorch", 3.0, 2.0),
            implementation(machine, "r1kernels", 4.0, 1.0, "ours", tiny=0.25),
        )
    )
    lines = tables.not_best(record)
    assert len(lines) == 2 and all(
        f"{tables.FIRST_CALL}: eager PyTorch takes 0.75x" in line for line in lines
    )


def test_results_of_one_call_a_turn_are_read_and_compared_by_first_calls(case, tmp_path):
    before = record_of(results.first_calls(case))
    before["schema"] = 1
    for row in before["cases"][0]["rows"]:
        for kind in ("cold", "calls", "overhead"):
            del row[kind]
    results.save(tmp_path / "before.json", before)
    read = results.load(tmp_path / "before.json")
    assert tables.FIRST_CALL not in markdown.document(read)
    (row,) = compare.table(read, record_of(case)).rows
    assert [cell.text for cell in row[2:6]] == ["4", "4", "1.00x", "1.00x"] and row[-1].text == "same"
