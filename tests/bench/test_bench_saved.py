"""Saved bytes of the experts: counted without memory as with it, and within what the committed table allows."""

import json

import pytest
import torch

from bench import documents, memory
from bench.ops import moe
from bench.ops.cases import MODELS, Case
from bench.studies import saved
from bench.table import mark

PEERS = {peer.name: peer for peer in moe.EXPERTS}
CASE = Case("moe_experts", "cpu", "bfloat16", {"T": 12, "H": 16, "I": 8, "E": 4, "K": 2})


def test_what_ours_keeps_by_hand():
    rows, size = 12 * 2, 2
    wanted = 12 * 16 * size + rows * 2 * 8 * size
    assert saved.goal(CASE) == wanted
    # besides: 5 offsets, permutation, inverse and weights of 4 bytes per row
    assert saved.count(CASE, PEERS[saved.OURS]) == wanted + 4 * 5 + 3 * 4 * rows
    without = saved.count(CASE, PEERS[saved.NOTHING_SAVED])
    assert without == 12 * 16 * size + 4 * 5 + 3 * 4 * rows


@pytest.mark.parametrize("name", saved.SHOWN)
def test_tensors_without_memory_are_counted_like_real_ones(name):
    inputs = moe.expert_inputs(CASE, torch.device("cpu"))
    inputs.require_grad()
    call = PEERS[name].make(CASE, inputs)
    with memory.counting_saved([inputs["gate_up"], inputs["down"]]) as found:
        call(inputs)
    if name == saved.EAGER:  # whose masks follow the routing: a token more or less at an expert
        assert saved.count(CASE, PEERS[name]) == pytest.approx(found.bytes, rel=0.1)
    else:
        assert saved.count(CASE, PEERS[name]) == found.bytes


def test_the_committed_table_holds_every_model_and_the_goal():
    record = json.loads((documents.ROOT / "bench/results/cpu/saved.json").read_text(encoding="utf-8"))
    assert [case["model"] for case in record["cases"]] == list(MODELS)
    for case in record["cases"]:
        kept = case["saved_bytes"]
        assert kept[saved.OURS] <= saved.ALLOWED * case["goal_bytes"]
        assert kept[saved.OURS] < kept[saved.GROUPED_MM] and kept[saved.OURS] < kept[saved.EAGER]


def test_a_table_shows_who_misses_the_goal():
    kept = dict.fromkeys(saved.SHOWN, 106)
    case = {"model": "m", "sizes": {"T": 1}, "goal_bytes": 100, "saved_bytes": kept}
    (table,) = saved.tables({"dtype": "bfloat16", "cases": [case]})
    (row,) = table.rows
    assert [mark(cell) for cell in row[3:]] == ["failed", "", "", ""] and table.failed
    assert row[3] == "106 B (1.060x)"
