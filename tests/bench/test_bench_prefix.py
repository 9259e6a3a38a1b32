"""The step with and without shared prefixes: all ways agree at a tiny shape, and the ideal counts what PyTorch counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import main
from bench.studies import prefix

SHAPE = prefix.TINY[0]


@pytest.mark.slow
def test_all_ways_take_the_same_step(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    out = tmp_path / "prefix.json"
    assert main(["prefix", "--tiny", "--rounds", "1", "--out", str(out)]) in (
        0,
        1,
    )  # 1: the gain is that of a large model
    record = json.loads(out.read_text(encoding="utf-8"))
    (case,) = record["cases"]
    assert {*case["rows"]} == {prefix.SHARED, prefix.REPEATED, prefix.TRL, prefix.TRL_SHARED}
    losses = [row["loss"] for row in case["rows"].values()]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)
    assert prefix.gain(case, prefix.REPEATED) > 0
    assert f"| {SHAPE.text} | {prefix.TRL} |" in prefix.tables(record)[0].markdown()


def test_a_way_with_another_gradient_gets_no_time(monkeypatch):
    own = prefix._repeated
    monkeypatch.setattr(prefix, "_repeated", lambda model, batch: own(model, batch) * 1.01)
    with pytest.raises(RuntimeError, match=f"{prefix.REPEATED}: gradient"):
        prefix.case(SHAPE, rounds=1)


def test_the_flops_of_the_layers_are_those_that_pytorch_counts():
    """One sequence of one completion token; of attention, which PyTorch does not count on a CPU, its two products a pair."""
    shape = replace(SHAPE, G=1, R=1)
    tokens = shape.P + 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shape.model()(input_ids=torch.zeros(1, tokens, dtype=torch.int64), logits_to_keep=1, use_cache=False)
    attention = shape.layers * 2 * 2 * shape.hidden * tokens * (tokens + 1) / 2
    assert shape.flops(False) == counter.get_total_flops() + attention
    assert shape.flops(True) == shape.flops(False)
