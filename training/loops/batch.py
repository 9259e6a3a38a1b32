"""Batches of sampled responses: micro-batches, padding, the forward pass, routing replay and log-probs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import r1kernels
from r1kernels.integrations import transformers as integration
from r1kernels.integrations.routing_record import RoutingReplay
from training.loops.sample import Completion
from training.model import StepLoad, recomputed
from training.recipe import Grpo


@dataclass(frozen=True)
class Batch:
    """B responses right behind their prompts, padded on the right, with N tokens in all.

    ids, mask (B, L): the last token of a response is no input, for nothing follows it. predicting (B, L) bool: the places whose
    states predict a token of the response. targets (N,): those tokens, response after response. cu_seqlens (B + 1,): their
    boundaries. routing: recorded experts (layers, B * L, K), or None.
    """

    ids: Tensor
    mask: Tensor
    predicting: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    routing: Tensor | None

    @property
    def lengths(self) -> list[int]:
        """Tokens of every response."""
        found: list[int] = self.cu_seqlens.diff().tolist()
        return found


def collate(completions: Sequence[Completion], pad: int, device: torch.device, replay: bool) -> Batch:
    """Puts completions into one batch; with `replay`, their recorded routing too."""
    length = max(len(c.prompt_ids) + len(c.token_ids) - 1 for c in completions)
    ids = torch.full((len(completions), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    predicting = torch.zeros(ids.shape, dtype=torch.bool)
    for row, completion in enumerate(completions):
        tokens = torch.tensor(completion.prompt_ids + completion.token_ids)
        end = len(tokens) - 1
        ids[row, :end] = tokens[:-1]
        mask[row, :end] = 1
        predicting[row, len(completion.prompt_ids) - 1 : end] = True
    targets = torch.tensor([token for c in completions for token in c.token_ids])
    ends = torch.tensor([0, *accumulate(len(c.token_ids) for c in completions)])
    recorded = [c.routing for c in completions if c.routing is not None]
    routing = integration.pad_routing(recorded, mask).to(device) if replay and recorded else None
    return Batch(
        ids.to(device), mask.to(device), predicting.to(device), targets.to(device), ends.to(device), routing
    )


def batches(
    completions: Sequence[Completion], rows: Sequence[int], config: Grpo, pad: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """The completions `rows` in batches of config.micro_batch_tokens, each with the numbers of its completions."""
    lengths = [len(completions[i].prompt_ids) + len(completions[i].token_ids) for i in rows]
    for piece in micro_batches(lengths, config.micro_batch_tokens):
        chosen = [rows[i] for i in piece]
        yield chosen, collate([completions[i] for i in chosen], pad, device, config.replay)


def micro_batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of sequences by their length, in pieces of at most `most` padded tokens, so that little padding is computed."""
    piece: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if piece and lengths[i] * (len(piece) + 1) > most:
            yield piece
            piece = []
        piece.append(i)
    if piece:
        yield piece


class Logprobs(NamedTuple):
    """logp and entropy (N,) of the tokens of Batch.targets, float32 (no entropy where it was not asked for); agreement: the share
    of replayed choices that the live router would have made too, nan without replay."""

    logp: Tensor
    entropy: Tensor
    agreement: float


@contextmanager
def routed(
    model: PreTrainedModel, batch: Batch, load: StepLoad | None = None
) -> Iterator[RoutingReplay | None]:
    """Inside the block the routing of the batch is replayed; the forward and the backward pass both belong there.

    load: counts the tokens of every expert, where given.
    """
    replaying = nullcontext() if batch.routing is None else integration.replay_routing(model, batch.routing)
    counting = nullcontext() if load is None else load.counting(batch.mask)
    with replaying as replay, counting, recomputed(model):
        yield replay


def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states (N, H) of the model that predict the N tokens of the responses."""
    # Padding stands on the right, where causal attention never sees it: no attention mask is needed.
    return integration.head_inputs(model, input_ids=batch.ids)[batch.predicting]


def logprobs(model: PreTrainedModel, batch: Batch, temperature: float, entropy: bool = False) -> Logprobs:
    """Log-prob and, with `entropy`, the entropy of every response token at `temperature`, with the routing replayed."""
    with routed(model, batch) as replay:
        results = head_logprobs(model, batch, states(model, batch), temperature, return_entropy=entropy)
    logp, value = results if entropy else (results, results.new_empty(0))
    return Logprobs(logp, value, math.nan if replay is None else replay.agreement)


def head_logprobs(
    model: PreTrainedModel, batch: Batch, hidden: Tensor, temperature: float, **options: Any
) -> Any:
    """r1kernels.linear_logprobs, with its options, of the states that `states` gives."""
    head = integration.output_head(model)._asdict()
    return r1kernels.linear_logprobs(
        hidden, targets=batch.targets, temperature=temperature, **head, **options
    )
