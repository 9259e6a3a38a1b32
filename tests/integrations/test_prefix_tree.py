"""The tree of sequences with common beginnings: what is shared, and how its positions lead back to the sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1kernels.integrations.prefix_tree import build, prefix_tree

TOKENS = st.lists(st.integers(0, 2), max_size=30)


@given(
    rows=st.lists(st.tuples(TOKENS.filter(len), TOKENS), min_size=1, max_size=8),
    least=st.sampled_from([1, 3, 16]),
)
def test_every_sequence_lies_on_a_path(rows, least):
    tree = build(
        [prompt + completion for prompt, completion in rows], [len(prompt) for prompt, _ in rows], least
    )
    for (prompt, completion), path in zip(rows, tree.paths(), strict=True):
        assert tree.input_ids[path].tolist() == prompt + completion
        assert tree.position_ids[path].tolist() == [*range(len(path))]
    assert tree.targets.tolist() == [token for _, completion in rows for token in completion]
    assert tree.lengths == tuple(len(completion) for _, completion in rows)
    expected = [path[len(prompt) - 1 : -1] for (prompt, _), path in zip(rows, tree.paths(), strict=True)]
    assert torch.equal(tree.predicts, torch.cat(expected))
    assert torch.equal(tree.multiplicity, torch.bincount(tree.sequences, minlength=tree.tokens))
    assert tree.multiplicity.min() > 0
    # the keys of a token: the nodes whose descendants hold it, and its own node up to itself
    for path in tree.paths():
        last = int(path[-1])
        nodes = [node for node in tree.nodes if node.start <= last < node.last]
        seen = [position for node in nodes for position in range(node.start, min(node.end, last + 1))]
        assert seen == path.tolist()
    if least == 1:  # each distinct beginning once
        sequences = [prompt + completion for prompt, completion in rows]
        assert tree.tokens == len({tuple(row[:end]) for row in sequences for end in range(1, len(row) + 1)})


def test_prompts_and_heads_are_found_wherever_they_stand():
    head, first, second = [*range(20)], [*range(30, 40)], [*range(50, 60)]
    tree = prefix_tree([head + first, head + second] * 3, [[index] for index in range(90, 96)])
    assert tree.tokens == 20 + 10 + 10 + 6
    assert [(n.end - n.start, n.last - n.end, n.depth) for n in tree.nodes[:2]] == [(20, 26, 0), (10, 3, 20)]
    assert tree.repeated_tokens == 6 * 31


def test_a_few_tokens_in_common_are_not_worth_a_node():
    assert len(prefix_tree([[1, 2, 3, 4], [1, 2, 3, 5]], [[6], [6]]).nodes) == 2
    assert len(prefix_tree([[*range(16), 4], [*range(16), 5]], [[6], [6]]).nodes) == 3


def test_pad_keeps_the_order_and_gradients():
    tree = prefix_tree([[9], [8], [9]], [[1, 2], [], [3]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    padded = tree.pad(values)
    assert padded.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]
    (padded * torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])).sum().backward()
    assert values.grad.tolist() == [1.0, 2.0, 16.0]


def test_tensors_are_lists():
    tree = prefix_tree(torch.tensor([[1, 2], [1, 3]]), [torch.tensor([4]), torch.tensor([5, 6])])
    assert tree.input_ids.tolist() == prefix_tree([[1, 2], [1, 3]], [[4], [5, 6]]).input_ids.tolist()


def test_bad_sequences_are_errors():
    with pytest.raises(
        ValueError, match="completion_ids: expected one completion per prompt.*got 1 for 2 prompts"
    ):
        prefix_tree([[1], [2]], [[3]])
    with pytest.raises(ValueError, match="at least one, got 0 for 0 prompts"):
        prefix_tree([], [])
    with pytest.raises(
        ValueError, match="prompt_ids: expected at least one token in each prompt, got none in prompt 1"
    ):
        prefix_tree([[1], []], [[3], [4]])
    for ids in (torch.tensor([1.5]), [1.5], torch.tensor([[1, 2]]), 1):
        with pytest.raises(TypeError, match="completion_ids: expected lists of token ids"):
            prefix_tree([[1]], [ids])
