"""Results: a broken kernel is FAILED and gets no time, ratios are paired, reports and comparisons say what they must."""

import functools
import json
import os
import sys
from dataclasses import replace

import pytest

import r1kernels
from bench import compare, documents, report, results, run
from bench.__main__ import main
from bench.ceilings import Ceilings
from bench.environment import environment
from bench.ops.cases import Case
from bench.results import Measured, Row, Run
from bench.table import mark
from tests.support.runs import exit_code

TINY = Case("token_logprobs", "cpu", "float32", {"N": 8, "V": 33}, quick=True)
CEILINGS = Ceilings(1e9, {"float32": 1e9, "bfloat16": 2e9}, 1e9)


def run_of(case=TINY):
    rows = run.rows(case, 0.0, compiles=False)
    left = {"route-T1-float32 on cuda": "needs a GPU"}
    return Run(environment("cpu"), CEILINGS, "2026-01-01", True, [Measured(case, rows, [0.0, 0.0])], left)


@pytest.fixture(scope="module")
def good():
    return run_of()


@pytest.fixture
def broken(monkeypatch):
    """Results of a kernel whose log-probs are off by a thousandth."""
    right = r1kernels.token_logprobs

    @functools.wraps(right)
    def wrong(*args, **kwargs):
        logp, entropy = right(*args, **kwargs)
        return logp * 1.001, entropy

    monkeypatch.setattr(r1kernels, "token_logprobs", wrong)
    return run_of()


def row(peer, seconds, kind="peer", **more):
    """A row with the same rounds in every phase."""
    phases = ("inference", "forward", "backward", "forward+backward")
    made = Row(peer, kind, errors={"logp": 1e-7, "d logits": 2e-7}, peak_bytes=1024, saved_bytes=10, **more)
    return replace(made, backend="cpu" if kind == "ours" else "", rounds={phase: seconds for phase in phases})


def made(good, *rows):
    """The good run with other rows."""
    results.settle(rows)
    return replace(good, cases=[replace(good.cases[0], rows=list(rows))])


# --- a broken kernel ---


def test_a_broken_kernel_is_failed_and_has_no_time(broken):
    own = broken.cases[0].ours[0]
    assert own.status == "failed" and own.seconds == {}
    assert own.reason.startswith("logp: error 0.001 above the allowed")
    assert run.failed(broken)


def test_the_report_shows_failed_where_a_time_would_stand(broken):
    for text in (report.page(broken), report.document(broken), report.terminal(broken)):
        assert "FAILED" in text and "above the allowed" in text
    headline = report.headline(broken).rows[0]
    assert headline[3].startswith("FAILED: logp") and mark(headline[3]) == "failed"
    assert '<td class="failed"' in report.page(broken)


def test_an_implementation_that_raises_is_shown_with_its_reason(monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("no kernel for you")

    monkeypatch.setattr("bench.ops.logprob.F.log_softmax", refuses)
    rows = run.rows(TINY, 0.0, compiles=False)
    eager = next(row for row in rows if row.peer == "eager PyTorch")
    assert (eager.status, eager.reason) == ("unavailable", "RuntimeError: no kernel for you")
    assert next(row for row in rows if row.kind == "ours").status == "ok"


# --- numbers ---


def test_every_time_carries_its_error(good):
    for found in good.cases[0].rows:
        if found.seconds and found.kind != "floor":
            assert set(found.errors) == {"logp", "entropy", "d logits"}


def test_ratios_are_paired_within_a_round():
    # the machine was ten times slower in the second round: medians alone would give 1.5 / 5.5
    ours, theirs = row("r1kernels", [1.0, 10.0, 2.0], "ours"), row("eager PyTorch", [3.0, 30.0, 6.0])
    results.settle([theirs, ours])
    assert theirs.over_ours("forward") == 3.0


def test_of_the_rounds_shortest_and_quartiles_stay():
    ours = row("r1kernels", [5.0, 1.0, 4.0, 2.0, 3.0], "ours")
    results.settle([ours])
    assert ours.seconds["forward"] == [1.0, 2.0, 3.0, 4.0]


def test_the_best_peer_is_the_fastest_that_is_right(good):
    wrong = row("a", [0.1], status="failed", reason="off")
    floor = row("bare GEMMs", [0.2], "floor")
    found = made(good, row("r1kernels", [1.0], "ours"), wrong, floor, row("b", [2.0]), row("c", [3.0]))
    assert found.cases[0].best("forward").peer == "b"


def test_a_case_that_we_lose_is_shown_as_such(good):
    lost = made(good, row("r1kernels", [2.0], "ours"), row("eager PyTorch", [4.0]), row("TRL", [1.0]))
    cells = report.headline(lost).rows[0]
    assert cells[4:7] == ["TRL", "1000", "0.50x, slower"] and cells[8] == "2.0x"
    (line, _) = report.not_best(lost)
    assert "TRL takes 0.50x our time; ours takes" in line and "floor, theirs" in line
    assert "Where we are not the best" in report.page(lost)
    won = made(good, row("r1kernels", [1.0], "ours"), row("TRL", [2.0]))
    assert "Where we are not the best" not in report.page(won)


def test_a_machine_that_is_not_quiet_is_told(good):
    quiet, busy = (
        replace(good, cases=[replace(good.cases[0], noise=noise)]) for noise in ([1.01, 1.02], [1.01, 1.5])
    )
    assert "not quiet" not in report.document(quiet) and "repeats within 2 %" in report.document(quiet)
    for text in (report.page(busy), report.document(busy), report.terminal(busy)):
        assert "The machine was not quiet: 1 of 2 times" in text


def test_rounds_that_do_not_repeat_are_named(good):
    found = made(good, row("r1kernels", [1.0, 1.9, 2.0], "ours"), row("TRL", [3.0, 3.0, 3.1]))
    (line,) = report.noisy(found)
    assert line.endswith("the median of r1kernels is 1.90x its shortest round.")
    assert line in report.page(found)


def test_the_best_ceilings_of_two_runs_lower_the_floor_of_a_case():
    best = CEILINGS.best(Ceilings(2e9, {"float32": 1.0, "bfloat16": 1.0}, 1e8))
    assert best == Ceilings(2e9, {"float32": 1e9, "bfloat16": 2e9}, 1e9)
    assert best.floors(TINY)["forward"] == (1056 / 2e9, "bandwidth")


def test_the_floor_takes_the_largest_ceiling():
    # 8 x 33 logits: 1056 bytes and 264 exponentials at 1e9 a second each
    assert CEILINGS.floors(TINY)["forward"] == (1056 / 1e9, "bandwidth")
    slow_exp = Ceilings(1e9, CEILINGS.flops_per_second, 1e8)
    assert slow_exp.floors(TINY)["forward"] == (264 / 1e8, "exp")


def test_pytest_benchmark_times_the_implementations_and_names_no_host(tmp_path):
    out = tmp_path / "found.json"
    options = ["-k", "grpo_loss and r1kernels", "--benchmark-max-time=0.05", f"--benchmark-json={out}"]

    def timed_alone():
        # in a process of pytest-xdist nothing would be timed
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
            del os.environ[name]
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", str(documents.ROOT / "bench"), *options]))

    assert exit_code(timed_alone) == 0
    found = json.loads(out.read_text())
    (timed,) = found["benchmarks"]
    assert timed["stats"]["min"] > 0 and timed["stats"]["rounds"] >= 5
    assert 0 <= timed["extra_info"]["errors"]["loss"] < 1e-5
    assert found["machine_info"]["device"] == "cpu" and "node" not in found["machine_info"]


# --- reports ---


def test_the_page_stands_alone_and_holds_what_it_must(good):
    text = report.page(good, good)
    for word in ("Headline", "Inference", "How far from the floor", "Changes", "Not run", "Environment", "needs a GPU",
                 "Not measured on a GPU"):  # fmt: skip
        assert word in text
    assert "https://" not in text and "<script" not in text
    assert text.count("http://") == text.count("http://www.w3.org/")  # names of the parts of SVG


def test_markdown_tables_are_even(good):
    for block in report.document(good).split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("| "):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_results_go_through_a_file(good, tmp_path):
    found = made(
        good,
        row("r1kernels", [1.0, 2.0], "ours"),
        row("TRL", [3.0, 3.0]),
        row("a", [], status="failed", reason="x"),
    )
    found.save(tmp_path / "a.json")
    read = results.load(tmp_path / "a.json")
    for kept in found.cases[0].rows:
        kept.rounds = {}
    assert read == found
    (tmp_path / "b.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="expected benchmark results of schema"):
        results.load(tmp_path / "b.json")


def test_the_command_line_reports_and_compares(good, tmp_path, capsys):
    path = tmp_path / "a.json"
    good.save(path)
    assert main(["report", str(path)]) == 0
    assert path.with_suffix(".html").is_file() and path.with_suffix(".md").is_file()
    assert "token_logprobs" in capsys.readouterr().out
    assert main(["compare", str(path), str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("same |")


# --- comparing two results ---


def verdict(good, before, after):
    old, new = (
        made(good, row("r1kernels", [ours], "ours"), row("eager PyTorch", [eager]))
        for ours, eager in (before, after)
    )
    return compare.changes(old, new).rows[0][-1]


def test_a_verdict_allows_for_a_machine_that_is_slower(good):
    assert verdict(good, (1.0, 10.0), (1.0, 10.0)) == "same"
    assert verdict(good, (1.0, 10.0), (2.0, 10.0)) == "slower"
    assert verdict(good, (1.0, 10.0), (0.5, 10.0)) == "faster"
    assert verdict(good, (1.0, 10.0), (2.0, 20.0)) == "same"


def test_a_kernel_that_broke_is_failed_in_the_comparison(good, broken):
    assert compare.changes(good, broken).rows[0][-1] == "FAILED"
