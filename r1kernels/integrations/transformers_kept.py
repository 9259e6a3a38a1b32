"""The tokens that a generation of transformers drew from: what its logits processors (top-k, top-p, min-p, ...) left.

B sequences, T tokens of their completions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .transformers_logprobs import unwrapped


class KeptRecord:
    """What each step of a generation drew from.

    ``steps`` holds for each token of the completions the ids that were left, sequence after sequence, and how many of each (B,).
    """

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def add(self, scores: Tensor) -> None:
        """One step: scores (B, V), -inf where a token is left out."""
        left = scores > -torch.inf
        left &= ~left.all(dim=1, keepdim=True)  # the whole vocabulary is no set
        self.steps.append((left.nonzero()[:, 1].int(), left.sum(dim=1)))

    def sets(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``kept`` of the log-prob ops for the B T tokens of the completions: (ids int32, offsets int64), on the device of the steps.

        Args:
            mask: (B, T), not 0 at a token that was drawn; elsewhere, as behind the end of a completion, the set is empty. T may be
                less than the recorded steps, or more.
        """
        if not self.steps:
            raise ValueError("record: expected a generation, got none")
        device, sequences = self.steps[0][1].device, self.steps[0][1].shape[0]
        checks.tensor("mask", mask, shape=(sequences, None))
        steps = self.steps[: mask.shape[1]]
        counts = torch.stack([count for _, count in steps], dim=1)
        # of each id the sequence and the step, in the order of the steps
        sequence = torch.cat([torch.arange(sequences, device=device).repeat_interleave(c) for _, c in steps])
        step = torch.arange(len(steps), device=device).repeat_interleave(counts.sum(dim=0))
        drawn = (mask != 0).to(device)
        order = (sequence * len(steps) + step).argsort(stable=True)
        order = order[drawn[sequence[order], step[order]]]
        sizes = torch.zeros(mask.shape, dtype=torch.int64, device=device)
        sizes[:, : len(steps)] = counts * drawn[:, : len(steps)]
        return torch.cat([ids for ids, _ in steps])[order], _offsets(sizes.flatten())


def kept_sets(scores: Sequence[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """``kept`` of the log-prob ops, from the output of ``model.generate(..., output_scores=True, return_dict_in_generate=True)``.

    Args:
        scores: its ``scores``, one (B, V) for each token, processed.
        mask: as in ``KeptRecord.sets``.
    """
    record = KeptRecord()
    for one in scores:
        record.add(one)
    return record.sets(mask)


@contextmanager
def record_kept(model: Any) -> Iterator[KeptRecord]:
    """Record what ``model.generate`` draws from in a ``with`` block, for one call of it with sampling; no scores are kept.

    Args:
        model: a causal language model of transformers, also inside PEFT or DistributedDataParallel.

    Yields:
        KeptRecord, whose ``sets(mask)`` are ``kept`` of the log-prob ops.
    """
    inner = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    record, own = KeptRecord(), inner._get_logits_processor

    def processors(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        found.append(_noting(record))  # behind all others
        return found

    inner._get_logits_processor = processors
    try:
        yield record
    finally:
        del inner._get_logits_processor


def _noting(record: KeptRecord) -> Any:
    def note(input_ids: Tensor, scores: Tensor) -> Tensor:
        record.add(scores)
        return scores

    return note


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
