"""Results: a broken kernel is FAILED and gets no time, ratios are paired, reports and comparisons say what they must."""

import functools
import json
import os
import subprocess
import sys

import pytest

import r1kernels
from bench import compare, documents, results, run
from bench.__main__ import main
from bench.cases import Case
from bench.ceilings import Ceilings
from bench.measure import Effort
from bench.report import markdown, page, reasons, tables

TINY = Case("token_logprobs", "cpu", "float32", {"N": 8, "V": 33}, quick=True)
CEILINGS = Ceilings(1e9, {"float32": 1e9, "bfloat16": 2e9}, 1e9)


def record_of(case=TINY):
    record = run.begin("cpu", True, CEILINGS, [(Case("route", "cuda", "float32", {"T": 1}), "needs a GPU")])
    rows = run.rows(case, Effort(0.0), lambda text: None, compiles=False)
    record["cases"].append(results.case_record(case, rows, CEILINGS, (0.0, 0.0)))
    return json.loads(json.dumps(record))


@pytest.fixture(scope="module")
def good():
    return record_of()


@pytest.fixture
def broken(monkeypatch):
    """Results of a kernel whose log-probs are off by a thousandth."""
    right = r1kernels.token_logprobs

    @functools.wraps(right)
    def wrong(*args, **kwargs):
        logp, entropy = right(*args, **kwargs)
        return logp * 1.001, entropy

    monkeypatch.setattr(r1kernels, "token_logprobs", wrong)
    return record_of()


def row(peer, seconds, kind="peer", **more):
    """A row as in a results file: the same seconds in every phase."""
    samples = {"inference": seconds, "forward": seconds, "backward": seconds, "forward+backward": seconds}
    return {
        "peer": peer, "kind": kind, "package": "torch", "version": "1", "status": "ok", "reason": "",
        "backend": "cpu" if kind == "ours" else "", "errors": {"logp": 1e-7, "d logits": 2e-7}, "limits": {},
        "samples": samples, "cold": {}, "calls": {}, "overhead": {}, "peak_bytes": 1024, "saved_bytes": 10, **more,
    }  # fmt: skip


def made(good, *rows):
    """The good record with other rows."""
    case = {**good["cases"][0], "rows": list(rows)}
    return {**good, "cases": [case]}


# --- a broken kernel ---


def test_a_broken_kernel_is_failed_and_has_no_time(broken):
    own = results.main_row(broken["cases"][0])
    assert own["status"] == "failed" and own["samples"] == {}
    assert own["reason"].startswith("logp: error 0.001 above the allowed")
    assert run.failed(broken)


def test_the_report_shows_failed_where_a_time_would_stand(broken):
    for text in (page.page(broken), markdown.document(broken), markdown.terminal(broken)):
        assert "FAILED" in text and "above the allowed" in text
    headline = tables.headline(broken).rows[0]
    assert headline[3].text.startswith("FAILED: logp") and headline[3].mark == "failed"
    assert '<td class="failed"' in page.page(broken)


def test_an_implementation_that_raises_is_shown_with_its_reason(monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("no kernel for you")

    monkeypatch.setattr("bench.logprob.F.log_softmax", refuses)
    rows = run.rows(TINY, Effort(0.0), lambda text: None, compiles=False)
    eager = next(row for row in rows if row.peer == "eager PyTorch")
    assert (eager.status, eager.reason) == ("unavailable", "RuntimeError: no kernel for you")
    assert next(row for row in rows if row.kind == "ours").status == "ok"


# --- numbers ---


def test_every_time_carries_its_error(good):
    for found in good["cases"][0]["rows"]:
        if found["samples"] and found["kind"] != "floor":
            assert set(found["errors"]) == {"logp", "entropy", "d logits"}


def test_ratios_are_paired_within_a_round(good):
    # the machine was ten times slower in the second round: medians alone would give 1.5 / 5.5
    ours, theirs = row("r1kernels", [1.0, 10.0, 2.0], "ours"), row("eager PyTorch", [3.0, 30.0, 6.0])
    assert results.ratio(theirs, ours, "forward") == 3.0


def test_the_best_peer_is_the_fastest_that_is_right(good):
    wrong = row("a", [0.1], status="failed", reason="off")
    floor = row("bare GEMMs", [0.2], "floor")
    case = made(good, row("r1kernels", [1.0], "ours"), wrong, floor, row("b", [2.0]), row("c", [3.0]))[
        "cases"
    ][0]
    assert results.best_peer(case, "forward")["peer"] == "b"


def test_a_case_that_we_lose_is_shown_as_such(good):
    record = made(good, row("r1kernels", [2.0], "ours"), row("eager PyTorch", [4.0]), row("TRL", [1.0]))
    cells = tables.headline(record).rows[0]
    assert [cell.text for cell in cells[4:8]] == ["TRL", "1000", "0.50x, slower", "2.0x"]
    (line, _) = tables.not_best(record)
    assert "TRL takes 0.50x our time" in line
    assert "Where we are not the best" in page.page(record)
    assert "Where we are not the best" not in page.page(
        made(good, row("r1kernels", [1.0], "ours"), row("TRL", [2.0]))
    )


def test_a_reason_says_what_the_numbers_say(good):
    case = made(good, row("r1kernels", [2.0], "ours"), row("eager PyTorch", [4.0]), row("TRL", [1.0]))[
        "cases"
    ][0]
    assert "ours takes" in reasons.reason(case, case["rows"][2], "inference")
    assert "the bandwidth floor, theirs" in reasons.reason(case, case["rows"][2], "inference")
    short = made(good, row("r1kernels", [2e-4], "ours"), row("TRL", [1e-4]))["cases"][0]
    assert "time goes into what surrounds the work" in reasons.reason(short, short["rows"][1], "inference")
    served = made(good, row("r1kernels", [2.0], "ours", backend="reference"), row("TRL", [1.0]))["cases"][0]
    assert reasons.reason(served, served["rows"][1], "inference") == reasons.NO_KERNEL
    measured = row("r1kernels", [2e-4], "ours", overhead={"inference": 1.5e-4})
    spent = made(good, measured, row("TRL", [1e-4]))["cases"][0]
    assert "ours takes 0.2 ms, of which 0.15 ms at any size" in reasons.reason(
        spent, spent["rows"][1], "inference"
    )


def test_of_a_whole_step_the_reason_names_the_part_that_is_slower(good):
    ours, theirs = row("r1kernels", [2.0], "ours"), row("plain PyTorch", [1.0])
    ours["samples"] = {"rollout": [1.0], "update": [1.0], "step": [2.0]}
    theirs["samples"] = {"rollout": [0.9], "update": [0.1], "step": [1.0]}
    case = {**made(good, ours, theirs)["cases"][0], "op": "grpo_step", "phases": {}}
    assert reasons.reason(case, theirs, "step") == "most is lost in update, 10x theirs"


def test_a_machine_that_is_not_quiet_is_told(good):
    quiet = {**good, "cases": [{**good["cases"][0], "noise": [1.01, 1.02]}]}
    busy = {**good, "cases": [{**good["cases"][0], "noise": [1.01, 1.5]}]}
    assert "not quiet" not in markdown.document(quiet) and "repeats within 2 %" in markdown.document(quiet)
    for text in (page.page(busy), markdown.document(busy), markdown.terminal(busy)):
        assert "The machine was not quiet: 1 of 2 times" in text


def test_rounds_that_do_not_repeat_are_named(good):
    record = made(good, row("r1kernels", [1.0, 1.9, 2.0], "ours"), row("TRL", [3.0, 3.0, 3.1]))
    (line,) = tables.noisy(record)
    assert line.endswith("the median of r1kernels is 1.90x its shortest round.")
    assert line in page.page(record)


def test_the_best_ceilings_of_two_runs_lower_the_floor_of_a_case(good):
    case = json.loads(json.dumps(good["cases"][0]))
    best = CEILINGS.best(Ceilings(2e9, {"float32": 1.0, "bfloat16": 1.0}, 1e8))
    assert best == Ceilings(2e9, {"float32": 1e9, "bfloat16": 2e9}, 1e9)
    results.set_floors(case, best)
    assert case["phases"]["forward"]["floor_seconds"] == pytest.approx(1056 / 2e9)


def test_the_floor_takes_the_largest_ceiling():
    # 8 x 33 logits: 1056 bytes and 264 exponentials at 1e9 a second each
    assert CEILINGS.floors(TINY)["forward"] == (1056 / 1e9, "bandwidth")
    slow_exp = Ceilings(1e9, CEILINGS.flops_per_second, 1e8)
    assert slow_exp.floors(TINY)["forward"] == (264 / 1e8, "exp")


def test_pytest_benchmark_times_the_implementations_and_names_no_host(tmp_path):
    out = tmp_path / "found.json"
    options = ["-k", "grpo_loss and r1kernels", "--benchmark-max-time=0.05", f"--benchmark-json={out}"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", *options]
    # in a process of pytest-xdist nothing would be timed
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(command, cwd=documents.ROOT, env=alone, check=True, capture_output=True)
    found = json.loads(out.read_text())
    (timed,) = found["benchmarks"]
    assert timed["stats"]["min"] > 0 and timed["stats"]["rounds"] >= 5
    assert 0 <= timed["extra_info"]["errors"]["loss"] < 1e-5
    assert found["machine_info"]["device"] == "cpu" and "node" not in found["machine_info"]


# --- reports ---


def test_the_page_stands_alone_and_holds_what_it_must(good):
    text = page.page(good, good)
    for word in ("Headline", "Inference", "How far from the floor", "Changes", "Not run", "Environment", "needs a GPU",
                 "Not measured on a GPU"):  # fmt: skip
        assert word in text
    assert "http://" not in text and "https://" not in text and "<script" not in text


def test_markdown_tables_are_even(good):
    for block in markdown.document(good).split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("| "):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_results_go_through_a_file(good, tmp_path):
    results.save(tmp_path / "a.json", good)
    assert results.load(tmp_path / "a.json") == good
    (tmp_path / "b.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="expected benchmark results of schema"):
        results.load(tmp_path / "b.json")


def test_the_command_line_reports_and_compares(good, tmp_path, capsys):
    path = tmp_path / "a.json"
    results.save(path, good)
    assert main(["report", str(path)]) == 0
    assert path.with_suffix(".html").is_file() and path.with_suffix(".md").is_file()
    assert "token_logprobs" in capsys.readouterr().out
    assert main(["compare", str(path), str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("same")


# --- comparing two results ---


def verdict(good, before, after):
    old = made(good, row("r1kernels", [before[0]], "ours"), row("eager PyTorch", [before[1]]))
    new = made(good, row("r1kernels", [after[0]], "ours"), row("eager PyTorch", [after[1]]))
    return compare.table(old, new).rows[0][-1].text


def test_a_verdict_allows_for_a_machine_that_is_slower(good):
    assert verdict(good, (1.0, 10.0), (1.0, 10.0)) == "same"
    assert verdict(good, (1.0, 10.0), (2.0, 10.0)) == "slower"
    assert verdict(good, (1.0, 10.0), (0.5, 10.0)) == "faster"
    assert verdict(good, (1.0, 10.0), (2.0, 20.0)) == "same"


def test_a_kernel_that_broke_is_failed_in_the_comparison(good, broken):
    assert compare.table(good, broken).rows[0][-1].text == "FAILED"
