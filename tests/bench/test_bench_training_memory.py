"""The bench of training memory runs, and what it found lies near what the dry run says."""

import pytest

from bench import results
from bench.studies import training_memory


@pytest.mark.parametrize(("rank", "recomputes", "optimizer"), training_memory.CASES)
def test_a_case_measures_a_step_and_what_the_dry_run_says(rank, recomputes, optimizer):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    found = training_memory.case(training_memory.TINY, rank, recomputes, optimizer)
    weights = 4 * training_memory.parameters(training_memory.TINY)
    # gradients, moments and a reference beside them
    held = weights if rank else (3 if optimizer == "adamw_8bit" else 5) * weights
    assert held < found["dry_run_bytes"] < 20 * held
    assert len(found["response_tokens"]) == 1


def test_a_process_of_its_own_measures_a_peak():
    """Without adapters, whose libraries take longer to import than all else."""
    found = training_memory.alone(training_memory.TINY, 0, True, "adamw")
    assert found["peak_bytes"] is None or found["peak_bytes"] > 0


@pytest.mark.parametrize("case", training_memory.CASES)
def test_the_committed_peaks_lie_near_what_the_dry_run_says(case):
    record = results.committed("training_memory")
    assert record["sizes"] == training_memory.SIZES
    (found,) = [
        each
        for each in record["cases"]
        if (each["rank"], each["gradient_checkpointing"], each["optimizer"]) == case
    ]
    said = training_memory.said(training_memory.SIZES, *case)
    assert found["dry_run_bytes"] == pytest.approx(said, rel=0.02)
    assert said == pytest.approx(found["peak_bytes"], rel=training_memory.ALLOWED)
