"""What README and docs show as measured is what the committed results hold, and the results keep their promises."""

import json

import pytest
import torch

from bench import documents, guard, pictures, results
from bench.ops import numerics
from bench.ops.peers import EAGER
from bench.studies import pipeline, precision, ranks, truncation
from training.recipe import load
from training.run_dir import RunDir

RESULTS = documents.ROOT / "bench/results/cpu"


@pytest.mark.parametrize("path", documents.FILES, ids=lambda path: path.name)
def test_the_tables_of_a_document_are_those_of_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- bench: " in text
    assert documents.filled(text) == text, "run `python -m bench documents`"


def test_the_pictures_show_the_committed_results():
    for path, (_, numbers, _) in pictures.fitting(documents.ROOT).items():
        assert numbers and pictures.shown(path.read_text(encoding="utf-8")) == numbers, (
            "run `python -m bench documents`"
        )


def test_without_kept_sets_ratios_are_off_by_what_was_kept_and_with_them_they_are_1():
    runs = results.committed("truncation")["runs"]
    for without, with_sets in zip(*(runs[name]["ratio_mean"] for name in runs), strict=True):
        assert truncation.TOP_P - 0.01 < without < 0.99
        assert with_sets == pytest.approx(1, abs=1e-4)


def test_the_table_of_ranks_compares_stage_by_stage():
    runs = [
        {"recipe": "tiny", "processes": count, "stage_seconds": {"base": base, "zero": zero}}
        for count, base, zero in ((1, 100.0, 20.0), (2, 55.0, 15.0))
    ]
    (table,) = ranks.tables({"runs": runs, "unshared_step_seconds": [0.1, 0.104]})
    assert table.rows == [
        ["base", "100 s", "55 s", "55 %"],
        ["zero", "20 s", "15 s", "75 %"],
        ["all", "120 s", "70 s", "58 %"],
    ]
    assert "1.04 times as long" in table.note and "less than 52 %" in table.note


def test_the_table_of_levels_shows_who_was_asked_many_times():
    def marks(greedy: float, reach: dict | None) -> dict:
        row = {"problems": 64, "greedy": greedy, "accuracy": greedy / 2, "length": 30.4}
        return row | ({"reach": reach} if reach else {})

    run = {
        split: {"base": marks(0.0, {"8": 0.5, "32": 0.75}), "sft1": marks(0.6, None)}
        for split in pipeline.SPLITS
    }
    table = pipeline.levels({"runs": [run, run]})
    assert [row[:2] for row in table.rows] == [[split, "base"] for split in pipeline.SPLITS]
    assert table.rows[0][2:] == ["64", "0.0 / 0.0", "0.0 / 0.0", "50.0 / 50.0", "75.0 / 75.0", "30 / 30"]


def test_ranks_are_compared_in_finished_runs(tmp_path):
    RunDir(tmp_path).write_recipe(load("tiny"))
    with pytest.raises(SystemExit, match="expected a finished run, but base has not run"):
        ranks.of_run(tmp_path)


def test_what_stands_between_marks_is_replaced(monkeypatch):
    monkeypatch.setattr(documents, "BLOCKS", {"ops": lambda: "new"})
    text = "a\n<!-- bench: ops -->\nold\n\nolder\n<!-- end -->\nb\n"
    assert documents.filled(text) == "a\n<!-- bench: ops -->\nnew\n<!-- end -->\nb\n"
    assert documents.filled("<!-- bench: ops -->\n<!-- end -->") == "<!-- bench: ops -->\nnew\n<!-- end -->"


def test_committed_results_name_no_host_and_no_path():
    paths = list(RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert "/root" not in text and "/tmp" not in text and "/home" not in text, path


def test_no_kernel_of_ours_failed_in_the_committed_results():
    run = results.load(RESULTS / "ops.json")
    assert run.cases and not [row for one in run.cases for row in one.ours if row.status != "ok"]


def test_ours_is_at_least_as_exact_as_eager_in_the_committed_table():
    rows = results.committed("precision")["rows"]
    errors = {(row["op"], row["peer"], row["dtype"]): row["errors"] for row in rows}
    compared = 0
    for (op, peer, dtype), found in errors.items():
        if peer.startswith("r1kernels"):
            for name, values in found.items():
                eager = errors[op, EAGER, dtype][name]
                # a divergence cannot be more exact than the logits of its two GEMMs, which round each in its own way
                rounding = 2 if op.startswith("linear_divergence") else 1
                for lead, ours, its in zip(precision.LEADS, values, eager, strict=True):
                    assert ours <= rounding * its, (op, dtype, lead, name)
                    compared += 1
    assert compared >= 2 * len(precision.LEADS) * 5


def test_the_exact_results_of_the_precision_table_agree_with_sixty_digits():
    from tests.support import logprob_oracle

    inputs = precision.logits_inputs(torch.float32, 30)
    few = {
        name: tensor[:2, :500] if tensor.ndim == 2 else tensor[:2] % 500
        for name, tensor in inputs.tensors.items()
    }
    few["logits"] = few["logits"].scatter(1, few["targets"].unsqueeze(1), 30.0)
    exact = numerics.softmax_rows(few["logits"], few["targets"], inputs.upstream["logp"][:2])
    logp, entropy = logprob_oracle.rows(few["logits"], few["targets"])
    assert exact["logp"] == pytest.approx(logp, rel=1e-12)
    assert exact["entropy"] == pytest.approx(entropy, rel=1e-7)


def test_committed_results_are_few_lines():
    files = (documents.ROOT / "bench/results").glob("**/*.json")
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in files) <= 4000


def test_the_guard_tells_what_became_slower():
    before = {"route": {"forward": 2.0, "backward": 1.0}}
    assert guard.compare(before, {"route": {"forward": 2.3, "backward": 1.0}}) == []
    (line,) = guard.compare(before, {"route": {"forward": 2.7, "backward": 1.0}, "new": {"forward": 9.0}})
    assert line == "SLOWER route, forward: 2 before, 2.7 now"


def test_the_baseline_holds_kernels_that_are_guarded():
    baseline = json.loads(guard.BASELINE.read_text(encoding="utf-8"))["ratios"]
    assert baseline and set(baseline) <= {case.id for case in guard.GUARDED}


def test_the_guard_needs_a_baseline(tmp_path):
    with pytest.raises(SystemExit, match="no baseline yet"):
        guard.main(update=False, baseline=tmp_path / "guard.json")


def test_the_guard_compares_with_no_other_instruction_set(tmp_path):
    baseline = tmp_path / "guard.json"
    record = json.loads(guard.BASELINE.read_text(encoding="utf-8"))
    record["environment"]["extension"] = "built, runs none of ours"
    baseline.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="its extension is built, runs none of ours, that of this machine "):
        guard.main(baseline=baseline)


def test_noise_goes_away_when_the_guard_measures_again_and_a_slower_kernel_does_not(monkeypatch):
    name = guard.GUARDED[0].id
    monkeypatch.setattr(guard, "GUARDED", guard.GUARDED[:1])
    monkeypatch.setattr(guard, "_backend", lambda case: "cpu")
    both = {"forward": 1.0, "backward": 1.0}

    def shortest(forward):
        return {"forward": (forward, 1.0), "backward": (1.0, 1.0)}

    for ours, found in (([3.0] * guard.REPEATS + [1.0], 1.0), ([3.0], 3.0)):
        times = iter(ours)
        last = ours[-1]
        monkeypatch.setattr(
            guard, "_shortest", lambda case, times=times, last=last: shortest(next(times, last))
        )
        assert guard.ratios({name: both})[name] == {"forward": found, "backward": 1.0}
