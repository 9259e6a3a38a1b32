"""sort_by_expert on every backend: offsets, permutation and inverse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1kernels.moe import sort_by_expert

pytestmark = pytest.mark.usefixtures("backend")


def test_worked_example():
    order = sort_by_expert(torch.tensor([[1, 0], [1, 3]]), 3)
    assert order.offsets.tolist() == [0, 1, 3, 3]
    assert order.permutation.tolist() == [1, 0, 2, 3]
    assert order.inverse.tolist() == [1, 0, 2, 3]
    assert order.offsets.dtype == torch.int32
    assert order.permutation.dtype == order.inverse.dtype == torch.int64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.lists(st.integers(0, 30), max_size=200))
def test_metadata(experts, indices):
    indices = [min(index, experts) for index in indices]
    offsets, permutation, inverse = (
        part.tolist() for part in sort_by_expert(torch.tensor(indices, dtype=torch.int64), experts)
    )
    rows = len(indices)
    assert sorted(permutation) == list(range(rows))
    assert all(permutation[inverse[index]] == index for index in range(rows))
    assert offsets[0] == 0 and all(start <= stop for start, stop in pairwise(offsets))
    # Python's own sort is stable: sentinels last, equal experts in their old order
    assert permutation == sorted(range(rows), key=lambda index: indices[index])
    for expert in range(experts):
        assert {indices[row] for row in permutation[offsets[expert] : offsets[expert + 1]]} <= {expert}
    assert {indices[row] for row in permutation[offsets[experts] :]} <= {experts}


def test_non_contiguous_indices_are_read_row_major():
    indices = torch.randint(0, 5, (4, 7), generator=torch.Generator().manual_seed(0))
    ours = sort_by_expert(indices.t().contiguous().t(), 5)
    for part, expected in zip(ours, sort_by_expert(indices, 5), strict=True):
        assert torch.equal(part, expected)


def test_compiled():
    compiled = torch.compile(lambda i: sort_by_expert(i, 3), backend="aot_eager", fullgraph=True)
    indices = torch.tensor([[2, 3], [0, 2], [1, 3]])
    for ours, expected in zip(compiled(indices), sort_by_expert(indices, 3), strict=True):
        assert torch.equal(ours, expected)


def test_compiled_with_unknown_experts(backend):
    compiled = torch.compile(lambda i: sort_by_expert(i, 3), backend="aot_eager", fullgraph=True)
    if backend == "cpu":
        with pytest.raises(
            RuntimeError, match=r"indices: expected values in \[0, 3\) or 3, got 7 at position 1"
        ):
            compiled(torch.tensor([2, 7, 0, -1, 1, 3]))
        return
    order = compiled(torch.tensor([2, 7, 0, -1, 1, 3]))
    assert order.offsets.tolist() == [0, 1, 2, 3]
    assert order.permutation.tolist() == [2, 4, 0, 1, 3, 5]


@pytest.mark.parametrize("bad", [-1, 4])
def test_out_of_range(bad):
    with pytest.raises(
        IndexError, match=rf"expected values in \[0, 3\) or 3, got {bad} at position \(1, 0\)"
    ):
        sort_by_expert(torch.tensor([[0, 3], [bad, 2]]), 3)


def test_bad_input():
    with pytest.raises(TypeError, match="indices: expected dtype"):
        sort_by_expert(torch.zeros(3), 3)
    with pytest.raises(ValueError, match="num_experts: expected at least 1"):
        sort_by_expert(torch.zeros(3, dtype=torch.int64), 0)
