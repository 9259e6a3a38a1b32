"""Log-probs of sampled responses: padding, the forward pass, and routing replay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import r1kernels
from r1kernels.integrations import transformers as integration
from training.loops.sample import Completion
from training.model import StepLoad

MICRO_BATCH_TOKENS = 4096  # padded tokens in one forward pass: what fits a core's cache is fastest


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


def micro_batches(completions: Sequence[Completion]) -> Iterator[list[int]]:
    """Indices by length, in pieces of at most MICRO_BATCH_TOKENS padded tokens."""

    def length(i: int) -> int:
        return len(completions[i].prompt_ids) + len(completions[i].token_ids)

    piece: list[int] = []
    for i in sorted(range(len(completions)), key=length):
        if piece and length(i) * (len(piece) + 1) > MICRO_BATCH_TOKENS:
            yield piece
            piece = []
        piece.append(i)
    if piece:
        yield piece


class States(NamedTuple):
    """Hidden states (N, H) that predict the N response tokens of a batch, row by row; agreement: the share of replayed
    choices that the live router would have made too, nan without replay."""

    hidden: Tensor
    agreement: float


class Logprobs(NamedTuple):
    """logp and entropy (B, L) at the places of Batch.targets, float32, 0 elsewhere (the entropy everywhere where it was not
    asked for); agreement: see States."""

    logp: Tensor
    entropy: Tensor
    agreement: float


def states(model: PreTrainedModel, batch: Batch, load: StepLoad | None = None) -> States:
    """The model without its head, with the routing of the batch replayed.

    load: counts the tokens of every expert, where given.
    """
    replaying = nullcontext() if batch.routing is None else integration.replay_routing(model, batch.routing)
    counting = nullcontext() if load is None else load.counting(batch.mask)
    with replaying as replay, counting:
        # Padding stands on the right, where causal attention never sees it: no attention mask is needed.
        hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return States(hidden[batch.response_mask], math.nan if replay is None else replay.agreement)


def logprobs(
    model: PreTrainedModel,
    batch: Batch,
    temperature: float,
    load: StepLoad | None = None,
    entropy: bool = False,
) -> Logprobs:
    """Log-prob and, with `entropy`, the entropy of every response token at `temperature`; see `states`."""
    found = states(model, batch, load)
    results = r1kernels.linear_logprobs(
        found.hidden,
        targets=batch.targets[batch.response_mask],
        temperature=temperature,
        return_entropy=entropy,
        **integration.output_head(model)._asdict(),
    )
    logp, value = results if entropy else (results, None)
    empty = torch.zeros(batch.targets.shape, dtype=logp.dtype, device=logp.device)
    return Logprobs(
        empty.masked_scatter(batch.response_mask, logp),
        empty if value is None else empty.masked_scatter(batch.response_mask, value),
        found.agreement,
    )
