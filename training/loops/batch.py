"""Forward passes over responses: which of them stand in one, how they are laid out, routing replay, states and log-probs.

B rows, L the longest of them, N tokens to predict, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import r1kernels
from r1kernels.integrations import transformers as integration
from r1kernels.integrations.prefix_tree import LEAST_SAVED, common_length, shared_size
from r1kernels.integrations.routing_record import RoutingReplay
from r1kernels.integrations.transformers import PrefixTree
from training.document import Stored
from training.engines import Kept
from training.loops.sample import Completion
from training.model import StepLoad, recomputed
from training.parallel import ranks
from training.parallel.shard import forward, is_divided

Ids = tuple[int, ...]


class Row(NamedTuple):
    """What the model reads of a prompt and its response, and what it is to predict: the tokens of the response.

    ids: prompt, at least one token, and response; its last token may be left out, for nothing follows it.
    """

    ids: Ids
    prompt: int  # tokens of it
    targets: Ids
    stored: Stored | None = None  # of the targets

    @property
    def prompt_ids(self) -> Ids:
        return self.ids[: self.prompt]


@dataclass(frozen=True)
class Padded:
    """Rows side by side, each token of each row computed.

    ids, mask (B, L): padded on the right. predicting (B, L) bool: the places whose states predict a target.
    """

    ids: Tensor
    mask: Tensor
    predicting: Tensor


@dataclass(frozen=True)
class Batch:
    """B rows with N tokens to predict.

    inputs: how the model reads them, side by side or as a tree, in which they share what they have in common. targets (N,): row
    after row. cu_seqlens (B + 1,): where those of each row begin. routing: recorded experts (layers, tokens read, K), or None.
    kept: what the targets were drawn from, or None where that was the whole vocabulary.
    """

    inputs: Padded | PrefixTree
    targets: Tensor
    cu_seqlens: Tensor
    routing: Tensor | None = None
    kept: Kept | None = None

    @property
    def lengths(self) -> list[int]:
        """Targets of every row."""
        found: list[int] = self.cu_seqlens.diff().tolist()
        return found

    @property
    def counts(self) -> Tensor | None:
        """How often each token that is read counts for the load of the experts; None: as often as rows share it."""
        return self.inputs.mask if isinstance(self.inputs, Padded) else None


def row_of(completion: Completion) -> Row:
    """A response behind its prompt; the sampler has not read its last token either."""
    ids = (*completion.prompt_ids, *completion.token_ids[:-1])
    return Row(ids, len(completion.prompt_ids), completion.token_ids)


def lay_out(rows: Sequence[Row], pad: int, device: torch.device, shared: bool = False) -> Batch:
    """Puts rows into one batch; `shared`: as a tree."""
    targets = torch.tensor([token for row in rows for token in row.targets])
    ends = torch.tensor([0, *accumulate(len(row.targets) for row in rows)])
    inputs = _tree(rows, targets) if shared else _padded(rows, pad, device)
    return Batch(inputs, targets.to(device), ends.to(device))


def _padded(rows: Sequence[Row], pad: int, device: torch.device) -> Padded:
    ids = torch.full((len(rows), max(len(row.ids) for row in rows)), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    predicting = torch.zeros(ids.shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
        predicting[place, row.prompt - 1 : row.prompt - 1 + len(row.targets)] = True
    return Padded(ids.to(device), mask.to(device), predicting.to(device))


def _tree(rows: Sequence[Row], targets: Tensor) -> PrefixTree:
    tree = _tree_of(rows)
    predicts = [
        path[row.prompt - 1 : row.prompt - 1 + len(row.targets)]
        for row, path in zip(rows, tree.paths(), strict=True)
    ]
    lengths = tuple(len(row.targets) for row in rows)
    # the last target of a row may be one that is not read
    return replace(tree, predicts=torch.cat(predicts), targets=targets, lengths=lengths)


def _tree_of(rows: Sequence[Row]) -> PrefixTree:
    return integration.prefix_tree([row.prompt_ids for row in rows], [row.ids[row.prompt :] for row in rows])


def collate(
    completions: Sequence[Completion], pad: int, device: torch.device, replay: bool, shared: bool = False
) -> Batch:
    """Puts completions into one batch with the sets that they were drawn from; with `replay`, their recorded routing too;
    `shared`: as a tree."""
    batch = lay_out([row_of(each) for each in completions], pad, device, shared)
    sets = [each.kept for each in completions if each.kept is not None]
    if sets:
        ids, offsets = Kept.joined(sets)
        batch = replace(batch, kept=Kept(ids.to(device), offsets))
    recorded = [each.routing for each in completions if each.routing is not None]
    if not (replay and recorded):
        return batch
    places = batch.inputs.mask if isinstance(batch.inputs, Padded) else batch.inputs
    return replace(batch, routing=integration.pad_routing(recorded, places).to(device))


def pieces(
    rows: Sequence[Row], most: int, shared: bool = False, model: PreTrainedModel | None = None
) -> Iterator[list[int]]:
    """Indices of the rows of this rank in pieces of at most `most` tokens that are computed: padded ones, or with `shared` those of
    trees. Every row is one rank's.

    model: that reads them; where it is divided every rank has as many pieces, and the last of some are empty (see `no_loss`).
    """
    own = own_rows(rows, shared)
    mine = [rows[i] for i in own]
    found = (
        micro_trees(mine, most)
        if shared
        else micro_batches([row.prompt + len(row.targets) for row in mine], most)
    )
    return padded_pieces(([own[i] for i in piece] for piece in found), model)


def padded_pieces(found: Iterator[list[int]], model: PreTrainedModel | None) -> Iterator[list[int]]:
    """Pieces, and behind them empty ones until there are as many as on every other rank, where `model` is divided."""
    if model is None or not is_divided(model):
        yield from found
        return
    own = list(found)
    most = max(ranks.gather(len(own)))  # before any pass, in which ranks meet too
    yield from own
    yield from [[]] * (most - len(own))


def no_loss(model: PreTrainedModel) -> Tensor:
    """0, with a gradient of zeros: the pass of a rank that has no piece where another one has, for a divided model needs all of them."""
    batch = lay_out([Row((0,), 1, (0,))], 0, model.device)
    with recomputed(model):
        return 0.0 * forward(model, partial(state_logprobs, model, batch)).sum()


def own_rows(rows: Sequence[Row], shared: bool) -> list[int]:
    """Indices of the rows that are this rank's: of lengths, or with `shared` of prompts, that are alike."""
    if ranks.world() == 1:
        return list(range(len(rows)))
    if not shared:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        return [order[i] for i in ranks.share([len(rows[i].ids) for i in order])]
    order = sorted(range(len(rows)), key=lambda i: (rows[i].prompt_ids, rows[i].ids))
    before = [(), *(rows[i].ids for i in order[:-1])]
    weights = [
        len(rows[i].ids) - common_length(last, rows[i].ids) for i, last in zip(order, before, strict=True)
    ]
    return [order[i] for i in ranks.share(weights)]


def micro_batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of sequences by their length, in pieces of at most `most` padded tokens, of which little is padding: a pass more costs
    about a sixteenth of what the largest does."""
    piece: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        padding = lengths[i] * len(piece) - tokens
        if piece and (lengths[i] * (len(piece) + 1) > most or padding > most // 16):
            yield piece
            piece, tokens = [], 0
        piece.append(i)
        tokens += lengths[i]
    if piece:
        yield piece


def worth_sharing(rows: Sequence[Row], most: int) -> bool:
    """Whether the tree of rows saves a tenth of the tokens that are computed of them in padded pieces of at most `most`: it has a
    price of its own, in the attention. Of texts that have nothing in common it saves the padding."""
    lengths = [len(row.ids) for row in rows]
    padded = sum(len(piece) * lengths[piece[-1]] for piece in micro_batches(lengths, most))
    return shared_size([row.ids for row in rows]) < 0.9 * padded


def micro_trees(rows: Sequence[Row], most: int) -> Iterator[list[int]]:
    """Indices of rows in pieces whose trees have at most `most` tokens, or a few more where a tree would save too little.

    Rows of one prompt stand together, next to those of prompts that begin alike, and are parted only where their own tree is
    too large.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].prompt_ids, rows[i].ids))
    piece: list[int] = []
    tokens = 0
    before: Ids = ()
    for prompt, group in groupby(order, key=lambda i: rows[i].prompt_ids):
        members = {i: len(rows[i].ids) - len(prompt) for i in group}
        new = len(prompt) - shared_tokens(before, prompt)
        if piece and tokens + new + sum(members.values()) > most:
            yield piece
            piece, tokens, new = [], 0, len(prompt)
        tokens += new
        for i, own in members.items():
            if piece and tokens + own > most:
                yield piece
                piece, tokens = [], len(prompt)
            piece.append(i)
            tokens += own
        before = prompt
    if piece:
        yield piece


def shared_tokens(one: Ids, other: Ids) -> int:
    """How many tokens of their beginnings a tree shares between two prompts; a few are not worth it."""
    alike = common_length(one, other)
    return alike if alike >= LEAST_SAVED else 0


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
    counting = nullcontext() if load is None else load.counting(batch.counts)
    with replaying as replay, counting, recomputed(model):
        yield replay


def states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states (N, H) of the model that predict the N targets."""
    if isinstance(batch.inputs, PrefixTree):
        return integration.shared_prefix_states(model, batch.inputs)
    # Padding stands on the right, where causal attention never sees it: no attention mask is needed.
    return integration.head_inputs(model, input_ids=batch.inputs.ids)[batch.inputs.predicting]


def logprobs(model: PreTrainedModel, batch: Batch, temperature: float, entropy: bool = False) -> Logprobs:
    """Log-prob and, with `entropy`, the entropy of every target at `temperature`, with the routing replayed."""
    compute = partial(state_logprobs, model, batch, temperature=temperature, return_entropy=entropy)
    with routed(model, batch) as replay:
        results = forward(model, compute)
    logp, value = results if entropy else (results, results.new_empty(0))
    return Logprobs(logp, value, math.nan if replay is None else replay.agreement)


def state_logprobs(model: PreTrainedModel, batch: Batch, **options: Any) -> Any:
    """`head_logprobs` of the states of a batch: a whole pass, for `parallel.shard.forward`."""
    return head_logprobs(model, batch, states(model, batch), **options)


def head_logprobs(model: PreTrainedModel, batch: Batch, hidden: Tensor, **options: Any) -> Any:
    """r1kernels.linear_logprobs, with its options, of the states that `states` gives, among what the targets were drawn from."""
    head = integration.output_head(model)._asdict()
    return r1kernels.linear_logprobs(hidden, targets=batch.targets, kept=batch.kept, **head, **options)
