"""Token sequences with common beginnings as one tree, each shared token once.

B sequences (prompt and completion), S tokens of all of them, N completion tokens, R the longest completion.

    prompt "a b c" with completions "d e" and "f", prompt "a b" with completion "g h"

    nodes              [a b] -> [c] -> [d e]          packed      a b c d e f g h
                                    -> [f]            position    0 1 2 3 4 3 2 3
                             -> [g h]                 sequences   0 1 2 3 4 | 0 1 2 5 | 0 1 6 7
                                                      predicts        2 3   |     2   |   1 6

(with nodes this short; a stretch is shared where that saves a few tokens at least.)
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# an attention over a node's keys costs about as much as the rest of the model for a handful of tokens
LEAST_SAVED = 16


class Node(NamedTuple):
    """A stretch of tokens that the same sequences share; its descendants follow it in the packed order, up to ``last``."""

    start: int  # packed positions [start, end)
    end: int
    last: int  # the descendants stand at [end, last)
    depth: int  # the position of its first token in its sequences


@dataclass(frozen=True)
class PrefixTree:
    """The packed form of B sequences; all tensors are int64 on the CPU.

    Attributes:
        input_ids: (tokens,), the tokens in depth-first order.
        position_ids: (tokens,), the position of each in its sequences.
        multiplicity: (tokens,), in how many of the B sequences each stands.
        predicts: (N,), the packed positions whose states predict the N completion tokens, in the caller's order row by row.
        targets: (N,), these completion tokens.
        lengths: the lengths of the B completions.
        sequences: (S,), the packed positions of the tokens of every sequence, in the caller's order row by row:
            ``values[tree.sequences]`` is the repeated form of one value per packed token.
        cu_seqlens: (B + 1,), where each sequence begins in ``sequences``.
        nodes: in depth-first order.
    """

    input_ids: Tensor
    position_ids: Tensor
    multiplicity: Tensor
    predicts: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    sequences: Tensor
    cu_seqlens: Tensor
    nodes: tuple[Node, ...]

    @property
    def tokens(self) -> int:
        """How many tokens a forward over the tree takes."""
        return self.input_ids.shape[0]

    @property
    def repeated_tokens(self) -> int:
        """How many tokens the B sequences have, each for itself."""
        return self.sequences.shape[0]

    @property
    def cu_completions(self) -> Tensor:
        """(B + 1,), where each completion begins in ``targets``: ``cu_seqlens`` of the packed ``grpo_loss``."""
        return _long([0, *accumulate(self.lengths)])

    def paths(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """The packed positions of the tokens of each sequence."""
        lengths = self.cu_seqlens.diff().tolist()
        return self.sequences.to(device).split(lengths)

    def pad(self, values: Tensor) -> Tensor:
        """One value per completion token, (N,), as (B, R), 0 beyond a completion's end; keeps gradients."""
        lengths = torch.tensor(self.lengths, device=values.device)
        real = torch.arange(max(self.lengths), device=values.device) < lengths.unsqueeze(1)
        return values.new_zeros(real.shape).masked_scatter(real, values)


def prefix_tree(
    prompt_ids: Sequence[Sequence[int] | Tensor], completion_ids: Sequence[Sequence[int] | Tensor]
) -> PrefixTree:
    """The tree of B sequences, each a prompt and one of its completions.

    Equal beginnings are found wherever they stand in the call: equal prompts, a head that prompts have in common, and
    completions that begin alike, where sharing them saves at least 16 tokens. It is made of token ids alone, on the CPU, in
    about the time of sorting them.

    Args:
        prompt_ids: B lists, or tensors of one dimension, of at least one token id.
        completion_ids: B of them too; an empty one has no log-probs.

    Returns:
        PrefixTree, for ``shared_prefix_logprobs`` and ``shared_prefix_states`` of any model, and ``tree.tokens``, the
        tokens of its forward, for the size of micro-batches.

    Raises:
        ValueError: no sequences, another number of completions than prompts, or an empty prompt. TypeError: a row is not a
            list or tensor of integers.
    """
    prompts = [_ids("prompt_ids", ids) for ids in prompt_ids]
    completions = [_ids("completion_ids", ids) for ids in completion_ids]
    if not prompts or len(prompts) != len(completions):
        raise ValueError(
            f"completion_ids: expected one completion per prompt and at least one, got {len(completions)} for "
            f"{len(prompts)} prompts"
        )
    empty = next((row for row, ids in enumerate(prompts) if not ids), None)
    if empty is not None:
        raise ValueError(
            f"prompt_ids: expected at least one token in each prompt, got none in prompt {empty}"
        )
    return build([p + c for p, c in zip(prompts, completions, strict=True)], [len(p) for p in prompts])


def shared_size(rows: Sequence[Sequence[int]]) -> int:
    """``build(rows, ...).tokens``: how many tokens a forward over the tree of the sequences takes, without making it."""
    return len(_stretches(rows, LEAST_SAVED)[0])


def _stretches(
    rows: Sequence[Sequence[int]], least_saved: int
) -> tuple[list[int], list[Node], list[int], dict[tuple[int, ...], list[int]]]:
    """Tokens, nodes without their ``last``, the parent of each (-1: none), and the packed positions of each distinct sequence."""
    distinct = sorted({tuple(row) for row in rows})
    common = [0, *(common_length(one, other) for one, other in pairwise(distinct))]
    ids: list[int] = []
    nodes: list[Node] = []
    parents: list[int] = []
    paths: dict[tuple[int, ...], list[int]] = {}
    # sequences [low, high) that have `depth` tokens laid out, up to node `parent`
    stack = [(0, len(distinct), 0, -1)]
    while stack:
        low, high, depth, parent = stack.pop()
        cuts = []
        shared = len(distinct[low])
        if high - low > 1:
            shared = min(common[low + 1 : high])
            cuts = [row for row in range(low + 1, high) if common[row] == shared]
        if not cuts or (shared - depth) * len(cuts) >= least_saved:
            if shared > depth:
                nodes.append(Node(len(ids), len(ids) + shared - depth, 0, depth))
                parents.append(parent)
                ids += distinct[low][depth:shared]
                depth, parent = shared, len(nodes) - 1
            if not cuts:
                path: list[int] = []
                above = parent
                while above >= 0:
                    path, above = [*range(*nodes[above][:2]), *path], parents[above]
                paths[distinct[low]] = path
        groups = zip([low, *cuts], [*cuts, high], strict=True) if cuts else ()
        stack += reversed([(first, end, depth, parent) for first, end in groups])
    return ids, nodes, parents, paths


def build(rows: list[list[int]], prompt_lengths: list[int], least_saved: int = LEAST_SAVED) -> PrefixTree:
    """The tree of the sequences ``rows``, whose tokens are predicted from ``prompt_lengths`` on."""
    ids, nodes, parents, paths = _stretches(rows, least_saved)
    last = [node.end for node in nodes]
    for node in reversed(range(len(nodes))):
        if parents[node] >= 0:
            last[parents[node]] = max(last[parents[node]], last[node])
    nodes = [node._replace(last=end) for node, end in zip(nodes, last, strict=True)]
    row_paths = [paths[tuple(row)] for row in rows]
    lengths = tuple(len(row) - first for row, first in zip(rows, prompt_lengths, strict=True))
    predicts = [path[first - 1 : -1] for path, first in zip(row_paths, prompt_lengths, strict=True)]
    targets = [row[first:] for row, first in zip(rows, prompt_lengths, strict=True)]
    sequences = _long([position for path in row_paths for position in path])
    return PrefixTree(
        input_ids=_long(ids),
        position_ids=torch.cat([torch.arange(n.depth, n.depth + n.end - n.start) for n in nodes]),
        multiplicity=torch.bincount(sequences, minlength=len(ids)),
        predicts=_long([position for positions in predicts for position in positions]),
        targets=_long([token for tokens in targets for token in tokens]),
        lengths=lengths,
        sequences=sequences,
        cu_seqlens=_long([0, *accumulate(len(path) for path in row_paths)]),
        nodes=tuple(nodes),
    )


def _ids(name: str, ids: Sequence[int] | Tensor) -> list[int]:
    try:
        return list(map(operator.index, ids.tolist() if isinstance(ids, Tensor) else ids))
    except TypeError:
        raise TypeError(
            f"{name}: expected lists of token ids, or tensors (L,) of them, got {ids!r}"
        ) from None


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect.bisect_left(lengths, True, key=lambda length: one[:length] != other[:length])


def _long(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
