"""Batches of sampled responses: micro-batches, padding, the forward pass, routing replay and log-probs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import r1kernels
from r1kernels.integrations import transformers as integration
from r1kernels.integrations.routing_record import RoutingReplay
from training.loops.sample import Completion
from training.model import StepLoad, recomputed


@dataclass(frozen=True)
class Batch:
    """Responses right behind their prompts, padded on the right.

    ids, mask (B, L): the last token of a response is no input, for nothing follows it. targets (B, L): at the place that
    predicts it, each token of the response; -100 elsewhere. routing: recorded experts (layers, B * L, K), or None.
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor
    routing: Tensor | None

    @property
    def response_mask(self) -> Tensor:
        """(B, L) bool, True where a token of the response is predicted."""
        return self.targets != -100


def collate(completions: Sequence[Completion], pad: int, device: torch.device, replay: bool) -> Batch:
    """Puts completions into one batch; with `replay`, their recorded routing too."""
    length = max(len(c.prompt_ids) + len(c.token_ids) - 1 for c in completions)
    ids = torch.full((len(completions), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, -100)
    for row, completion in enumerate(completions):
        tokens = torch.tensor(completion.prompt_ids + completion.token_ids)
        end = len(tokens) - 1
        ids[row, :end] = tokens[:-1]
        mask[row, :end] = 1
        targets[row, len(completion.prompt_ids) - 1 : end] = tokens[len(completion.prompt_ids) :]
    recorded = [c.routing for c in completions if c.routing is not None]
    routing = integration.pad_routing(recorded, mask).to(device) if replay and recorded else None
    return Batch(ids.to(device), mask.to(device), targets.to(device), routing)


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
    """logp and entropy (B, L) at the places of Batch.targets, float32, 0 elsewhere (the entropy everywhere where it was not
    asked for); agreement: the share of replayed choices that the live router would have made too, nan without replay."""

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
    """Hidden states (N, H) of the model that predict the N response tokens of a batch, row by row."""
    # Padding stands on the right, where causal attention never sees it: no attention mask is needed.
    return integration.head_inputs(model, input_ids=batch.ids)[batch.response_mask]


def logprobs(model: PreTrainedModel, batch: Batch, temperature: float, entropy: bool = False) -> Logprobs:
    """Log-prob and, with `entropy`, the entropy of every response token at `temperature`, with the routing replayed."""
    with routed(model, batch) as replay:
        logp, value = head_logprobs(model, batch, states(model, batch), temperature, entropy)
    return Logprobs(logp, value, math.nan if replay is None else replay.agreement)


def head_logprobs(
    model: PreTrainedModel, batch: Batch, hidden: Tensor, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (0 where it is not asked for), (B, L) each, from the hidden states of `states`."""
    results = r1kernels.linear_logprobs(
        hidden,
        targets=batch.targets[batch.response_mask],
        temperature=temperature,
        return_entropy=entropy,
        **integration.output_head(model)._asdict(),
    )
    logp, value = results if entropy else (results, None)
    empty = torch.zeros(batch.targets.shape, dtype=logp.dtype, device=logp.device)
    return (
        empty.masked_scatter(batch.response_mask, logp),
        empty if value is None else empty.masked_scatter(batch.response_mask, value),
    )
