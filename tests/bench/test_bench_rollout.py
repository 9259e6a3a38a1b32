"""The bench of rollouts runs, draws as much as it says, and its floor counts what a step of tiny reads."""

import pytest
import torch
import torch.nn.functional as F

from bench import ceilings
from bench.studies import rollout
from training.recipe import load


@pytest.fixture
def ceiling(monkeypatch):
    found = ceilings.Ceilings(1e9, {"float32": 1e12}, 1e12)
    monkeypatch.setattr(ceilings, "measure", lambda device: found)
    return found


def test_every_way_draws_a_response_to_every_prompt():
    model, asked = rollout.build(rollout.TINY), rollout.prompts(rollout.TINY, 3, 8)
    assert len(asked) == rollout.TINY.prompts and len(set(asked)) == 2
    assert len({prompt[:8] for prompt in asked}) == 1
    for name, draw in rollout.peers(model, asked, rollout.TINY).items():
        assert len(asked) <= draw() <= len(asked) * rollout.TINY.longest, name


def test_the_floor_of_a_decode_step_is_its_weights_and_its_cache(ceiling):
    found = rollout.decode(rows=16, longest=4, rounds=1)
    sizes = load("tiny").model
    width = sizes.qk_rope_head_dim + sizes.qk_nope_head_dim + sizes.v_head_dim
    # half of four tokens per row, and one prompt of 16
    cache = 4 * sizes.layers * sizes.heads * width * (16 * 2 + 16)
    weights = found["bytes"] - cache
    assert 4 * 200_000 < weights < 4 * 500_000  # tiny has 0.4 million parameters
    assert found["bound"] == "bandwidth" and found["floor_seconds"] == pytest.approx(
        found["bytes"] / 1e9, rel=1e-3
    )


def test_every_way_to_attend_reads_the_same_texts(monkeypatch):
    given, found = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        rollout.F,
        "scaled_dot_product_attention",
        lambda *args, **options: found.append(given(*args, **options)),
    )
    monkeypatch.setattr(rollout, "CALLS", 1)
    op = rollout.decode_attention
    monkeypatch.setattr(
        rollout, "decode_attention", lambda *args, **options: found.append(op(*args, **options))
    )
    case = rollout.attention("some", rollout.Step(4, 2, 5, 3, 2, 1, 8), 1)
    assert len(found) == 6
    assert all(torch.allclose(each.view(4, 2, 8), found[0], atol=1e-5) for each in found)
    assert all(len(each) == 1 for each in case["seconds"].values())
    shown = rollout.tables({**RECORD, "attention": [case]})[1].rows[0]
    assert shown[0].startswith("some: 4 rows, 2 prompts of 5 tokens") and len(shown) == 4


RECORD = {
    "sizes": vars(rollout.TINY),
    "environment": {"threads": 1},
    "cases": [
        {
            "title": "some prompts",
            "peers": [
                {"peer": "one", "tokens_per_second": [900.0, 1000.0, 5000.0]},
                {"peer": "other", "tokens_per_second": [], "reason": "RuntimeError: no"},
            ],
        }
    ],
    "decode": {"rows": 384, "seconds": [0.02, 0.03, 0.05], "floor_seconds": 0.01, "bound": "GEMM"},
}


def test_the_table_shows_rates_and_reasons():
    (found,) = rollout.tables(RECORD)
    assert list(found.rows[0]) == ["some prompts", "1,000", "RuntimeError: no"]
    assert "takes 30 ms, 3.0 times its floor of 10 ms (GEMM)" in found.note
