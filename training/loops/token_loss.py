"""What training minimises, token by token: the text itself, or how far the student is from a teacher's distribution.

N tokens to predict, H hidden, V vocabulary, K stored log-probs a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

import r1kernels
from r1kernels.integrations import transformers as integration
from training.loops.batch import Batch, Row, head_logprobs, states

NO_ID = -1  # padding of stored ids


class TokenLoss(Protocol):
    """A loss of every token of a batch."""

    @property
    def readers(self) -> Sequence[PreTrainedModel]:
        """Models beside the one that learns, which read the same batches."""

    def __call__(self, model: PreTrainedModel, batch: Batch, hidden: Tensor, rows: Sequence[Row]) -> Tensor:
        """(N,) from the hidden states (N, H) of ``model``, which predict the targets of ``rows``, row after row."""


class OfText:
    """The negative log-prob of the tokens that stand there."""

    readers: Sequence[PreTrainedModel] = ()

    def __call__(self, model: PreTrainedModel, batch: Batch, hidden: Tensor, rows: Sequence[Row]) -> Tensor:
        loss: Tensor = -head_logprobs(model, batch, hidden)
        return loss


@dataclass(frozen=True)
class OfTeacher:
    """The divergence (r1kernels.linear_divergence) from a teacher that reads the same tokens; both have one vocabulary."""

    teacher: PreTrainedModel
    kind: str
    beta: float

    @property
    def readers(self) -> Sequence[PreTrainedModel]:
        return (self.teacher,)

    def __call__(self, model: PreTrainedModel, batch: Batch, hidden: Tensor, rows: Sequence[Row]) -> Tensor:
        student, teacher = integration.output_head(model), integration.output_head(self.teacher)
        with torch.no_grad():
            teacher_hidden = states(self.teacher, batch)
        loss = r1kernels.linear_divergence(
            hidden,
            teacher_hidden=teacher_hidden,
            kind=self.kind,
            beta=self.beta,
            **student._asdict(),
            **{f"teacher_{name}": value for name, value in teacher._asdict().items()},
        )
        assert isinstance(loss, Tensor)  # no entropy is asked for
        return loss


@dataclass(frozen=True)
class OfStored:
    """The divergence (r1kernels.linear_topk_divergence) from K log-probs a token, which the rows have."""

    kind: str
    beta: float
    readers: Sequence[PreTrainedModel] = ()

    def __call__(self, model: PreTrainedModel, batch: Batch, hidden: Tensor, rows: Sequence[Row]) -> Tensor:
        ids: list[Sequence[int]] = []
        logp: list[Sequence[float]] = []
        for row in rows:
            assert row.stored is not None
            ids += row.stored.ids
            logp += row.stored.logp
        width = max(map(len, ids))
        found: Tensor = r1kernels.linear_topk_divergence(
            hidden,
            teacher_ids=torch.tensor([[*each, *[NO_ID] * (width - len(each))] for each in ids]).to(
                hidden.device
            ),
            teacher_logp=torch.tensor([[*each, *[0.0] * (width - len(each))] for each in logp]).to(
                hidden.device
            ),
            kind=self.kind,
            beta=self.beta,
            **integration.output_head(model)._asdict(),
        )
        return found
