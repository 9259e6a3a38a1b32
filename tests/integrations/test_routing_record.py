"""Load, records and replay as plain tensors. T tokens, B sequences, L positions, E experts, K experts per token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1kernels.integrations.routing_record import (
    NOT_RECORDED,
    ExpertLoad,
    RoutingRecord,
    RoutingReplay,
    pad_routing,
)


def draw(*shape, seed=0):
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))


def recorded(*forwards):
    """A record of forwards given as (layers, B, n, K)."""
    record = RoutingRecord(forwards[0].shape[0])
    for positions in forwards:
        for layer, indices in enumerate(positions.flatten(1, 2)):
            record.add(layer, indices)
    return record


def test_a_generation_with_a_cache_becomes_sequences():
    positions = draw(2, 3, 7, 2)  # a prompt of 4, then 3 single tokens; the 4th new token is never fed
    record = recorded(positions[:, :, :4], positions[:, :, 4:5], positions[:, :, 5:6], positions[:, :, 6:7])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0]])
    sequences = record.sequences(mask)
    for row, expected in enumerate([[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]):
        assert torch.equal(sequences[row].long(), positions[:, row, expected])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_pad_routing_is_the_inverse_of_sequences(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    rows = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    mask = torch.tensor([data.draw(rows) for _ in range(batch)])
    positions = draw(3, batch, length, 2, seed=data.draw(st.integers(0, 99)))
    sequences = recorded(positions).sequences(mask)
    padded = pad_routing(sequences, mask).view(3, batch, length, 2).long()
    assert torch.equal(padded, positions.masked_fill(mask[None, :, :, None] == 0, NOT_RECORDED))
    # another layout: one column of padding in front, and one more real token behind that has no record
    wider = torch.cat((torch.zeros(batch, 1), mask, torch.ones(batch, 1)), dim=1)
    again = pad_routing(sequences, wider).view(3, batch, length + 2, 2)
    assert torch.equal(again[:, :, 1:-1].long(), padded)
    assert (again[:, :, 0] == NOT_RECORDED).all() and (again[:, :, -1] == NOT_RECORDED).all()


def test_records_that_do_not_fit():
    positions = draw(2, 3, 4, 2)
    record = recorded(positions, positions)
    with pytest.raises(ValueError, match=r"record: expected one forward, got \[2\] a layer"):
        record.forward()
    with pytest.raises(ValueError, match="attention_mask: expected a row for each .* got 5"):
        record.sequences(torch.ones(5, 8))
    with pytest.raises(ValueError, match="attention_mask: expected at least 8 columns, got 7"):
        record.sequences(torch.ones(3, 7))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, L\)"):
        record.sequences(torch.ones(3))
    with pytest.raises(ValueError, match="record: expected at least one forward"):
        RoutingRecord(2).sequences(torch.ones(3, 8))
    sequences = recorded(positions).sequences(torch.ones(3, 4))
    with pytest.raises(ValueError, match="sequences: expected 2, .* got 3"):
        pad_routing(sequences, torch.ones(2, 4))
    with pytest.raises(ValueError, match="sequences: expected at most 3 tokens in sequence 0.* got 4"):
        pad_routing(sequences, torch.ones(3, 3))


def test_replay_agreement():
    routing = torch.tensor([[[0, 1], [2, 3], [-1, -1]]])  # one layer, the last token without a record
    replay = RoutingReplay(routing)
    assert math.isnan(replay.agreement)
    live = torch.tensor([[1, 0], [2, 4], [5, 6]])
    assert replay.choose(0, live, compare=True).tolist() == [[0, 1], [2, 3], [5, 6]]
    assert replay.agreement == 0.5  # the order of a token's experts does not matter
    with pytest.raises(
        ValueError, match=r"expected recorded indices of shape \(4, 2\) for layer 0, got \(3, 2\)"
    ):
        replay.choose(0, torch.zeros(4, 2, dtype=torch.int64), compare=True)


def test_expert_load():
    load = ExpertLoad(2, 4)
    load.add(0, torch.tensor([[0, 1], [0, 2], [0, 3]]))
    load.add(0, torch.tensor([[0, 1], [0, 2], [0, 3]]), torch.tensor([[1, 0, 1]]))
    assert load.counts.tolist() == [[5, 2, 1, 2], [0, 0, 0, 0]]
    assert load.max_over_mean().tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="attention_mask: expected 3 entries"):
        load.add(1, torch.zeros(3, 2, dtype=torch.int64), torch.ones(2, 3))
