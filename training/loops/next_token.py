"""Next-token training: pretraining and every supervised stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import notices, seeding
from training.context import StageContext
from training.document import Document
from training.encoder import Encoder
from training.errors import UserError
from training.loops.batch import Batch, Row, lay_out, no_loss, pieces, states, worth_sharing
from training.loops.optim import Optimizer, learning_rate, save_due, unfinished_warmup
from training.loops.token_loss import OfText, TokenLoss
from training.model import StepLoad, shares_prefixes
from training.parallel import ranks
from training.parallel.shard import bring_up_to_date, forward, learner_of
from training.profile import profiled
from training.recipe import NextToken


@dataclass(frozen=True)
class Amount:
    """How much is learnt: `steps` optimizer steps or, where `tokens` is not 0, that many tokens that carry a loss."""

    steps: int
    tokens: int = 0

    def done(self, step: int, learnt: int) -> float:
        """Of the steps, after `step` of them and `learnt` tokens."""
        return learnt * self.steps / self.tokens if self.tokens else step


def amount_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    config: NextToken,
    stage: str,
) -> Amount:
    """What `train` learns of these documents: config.steps, or the tokens of config.epochs."""
    rows, _ = _encode(Encoder(model, tokenizer), documents, config.max_length, stage)
    tokens = sum(len(row.targets) for row in rows)
    return Amount(_steps(config, len(rows)), 0 if config.steps else config.epochs * tokens)


def begun(
    model: PreTrainedModel, config: NextToken, context: StageContext
) -> tuple[PreTrainedModel, Optimizer, int, int]:
    """What learns, its optimizer, the step that comes next, and the tokens learnt so far: new, or from a resume point."""
    learner = learner_of(model, context.recipe)
    optimizer = Optimizer(
        learner, weight_decay=config.weight_decay, grad_clip=config.grad_clip, kind=config.optimizer
    )
    state = context.stage.load_state()
    if state is None:
        return learner, optimizer, 0, 0
    optimizer.restore(state)
    return learner, optimizer, state.step, state.counters["learnt"]


def _steps(config: NextToken, rows: int) -> int:
    return config.steps or max(1, round(config.epochs * rows / config.batch_size))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    config: NextToken,
    context: StageContext,
    *,
    title: str = "",
    token_loss: TokenLoss | None = None,
) -> dict[str, float]:
    """Trains `model` in place by the mean loss of the tokens that carry one: the negative log-prob, or `token_loss`.

        loss of a step = sum of loss(token) over the step's documents / number of those tokens

    Args:
        model: dense, or a mixture (where its routers have a selection bias, that is updated once a step).
        documents: at least one. A pass over them is in an order keyed by (seed, stage, title, epoch).
        config: steps (or epochs where steps is 0), batch_size, lr and so on.
        context: where metrics and resume points go; `context.stage` resumes a run that was cut off.
        title: names the training where one stage has several; part of the key of the order.

    Returns:
        The last metrics, with the number of documents that were cut as `truncated`; a warning says so, too. `learnt`: the tokens
        that carried a loss.
    """
    if not documents:
        raise UserError(f"{context.name}: there are no documents to train on")
    encoder = Encoder(model, tokenizer)
    rows, truncated = _encode(encoder, documents, config.max_length, context.name)
    steps = _steps(config, len(rows))
    if text := unfinished_warmup(context.name, config.warmup, steps):
        notices.warn("warm-up", text)
    learner, optimizer, start, learnt = begun(model, config, context)
    metrics: dict[str, float] = {}
    learner.train()
    with context.progress.bar(steps, start, title or context.name) as bar:
        for step in range(start, steps):
            began = time.perf_counter()
            key = (context.recipe.seed, context.name, title)
            at_once = [rows[i] for i in batch_of_step(len(rows), config.batch_size, step, key)]
            with (
                seeding.torch_seed(
                    context.recipe.seed, context.name, title, "dropout", step, *ranks.own_key()
                ),
                profiled(context.stage.path, step, start, steps),
            ):
                metrics = update(
                    learner,
                    optimizer,
                    at_once,
                    encoder.pad_id,
                    token_loss or OfText(),
                    config,
                    context,
                    (step, steps),
                )
            learnt += sum(len(row.targets) for row in at_once)
            metrics["learnt"] = learnt
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
            context.stage.log(step=step, **metrics)
            bar.advance(loss=metrics["loss"])
            if save_due(step + 1, steps, config.save_every, optimizer.unsaved_seconds):
                counters = {**optimizer.counters(), "learnt": learnt}
                context.stage.save_state(step + 1, optimizer.tensors(), counters)
    learner.eval()
    bring_up_to_date(model, learner)
    model.eval()
    if any(document.prompt for document in documents):
        encoder.note_ends()
    return {**metrics, "steps": steps, "truncated": truncated}


def update(
    model: PreTrainedModel,
    optimizer: Optimizer,
    rows: list[Row],
    pad: int,
    token_loss: TokenLoss,
    config: NextToken,
    context: StageContext,
    place: tuple[float, int],
) -> dict[str, float]:
    """One optimizer step by the mean loss of the targets of the rows. place: how many of so many steps are done."""
    shared = context.recipe.shared_prefix and worth_sharing(rows, config.micro_batch_tokens)
    shared = shared and all(shares_prefixes(each) for each in (model, *token_loss.readers))
    step, steps = place
    total = sum(len(row.targets) for row in rows)
    loss = 0.0
    load = StepLoad(model)
    for piece in pieces(rows, config.micro_batch_tokens, shared, model):
        if not piece:
            no_loss(model).backward()
            continue
        read = [rows[i] for i in piece]
        batch = lay_out(read, pad, model.device, shared)
        with load.counting(batch.counts):
            losses = forward(model, partial(_losses, token_loss, model, batch, read))
        part = losses.sum() / total
        part.backward()
        loss += float(part.detach())
    lr = learning_rate(
        step, steps, lr=config.lr, lr_end=config.lr_end, schedule="cosine", warmup=config.warmup
    )
    stepped = optimizer.step(loss, lr, load, context.stage.unsaved_seconds)
    if stepped.taken:
        load.update_bias(config.bias_rate)
    return {
        "loss": stepped.loss,
        "lr": lr,
        "grad_norm": stepped.norm,
        "tokens": sum(len(row.ids) for row in rows),
        "expert_load": load.max_over_mean(),
        "skipped": optimizer.skipped,
    }


def _losses(token_loss: TokenLoss, model: PreTrainedModel, batch: Batch, rows: list[Row]) -> Tensor:
    return token_loss(model, batch, states(model, batch), rows)


def _encode(
    encoder: Encoder, documents: Sequence[Document], max_length: int, stage: str
) -> tuple[list[Row], int]:
    """The documents as rows, and how many of them were cut: at max_length (0: none) and at the positions of the model."""
    most = min(length for length in (max_length, encoder.positions, sys.maxsize) if length)
    rows, longest, truncated = [], 0, 0
    read = ranks.spread(lambda own: [_ids(encoder, each) for each in own], documents)
    for document, (ids, first) in zip(documents, read, strict=True):
        truncated += len(ids) > most
        longest = max(longest, len(ids))
        targets = ids[first:most]
        stored = document.stored
        if stored is not None:  # where nothing stands before a response, its first token is not predicted
            stored = stored.part(len(stored.ids) - (len(ids) - first), len(targets))
        rows.append(Row(ids[:most], first, targets, stored))
    if truncated:
        notices.warn(
            "documents",
            f"{truncated} of {len(rows)} documents were cut at {most} tokens and never show how they end; the longest has "
            f"{longest}: raise {stage}.max_length or leave them out",
        )
    rows = [row for row in rows if row.targets]
    if not rows:
        raise UserError(
            f"{stage}.max_length: {most} tokens, what it leaves or the model reads, hold nothing to learn of any document"
        )
    return rows, truncated


def _ids(encoder: Encoder, document: Document) -> tuple[tuple[int, ...], int]:
    """Token ids of a document, and the first of them that is learnt."""
    if not document.prompt:
        return tuple(encoder.document(document.text)), 1  # nothing predicts the first token
    prompt, opening = encoder.prompt(document.prompt)
    response = encoder.response(document.text, opening)
    if document.stored is not None and len(document.stored.ids) != len(response):
        raise UserError(
            f"teacher_ids: expected a list for each of the {len(response)} tokens of the response, its end counted, got "
            f"{len(document.stored.ids)}: {document.text!r:.60}"
        )
    return (*prompt, *response), max(1, len(prompt))


def batch_of_step(count: int, size: int, step: int, key: tuple[int | str, ...]) -> list[int]:
    """Indices of the documents of a step: pass after pass over all of them, each in its own keyed order."""
    chosen: list[int] = []
    position = step * size
    while len(chosen) < size:
        epoch, offset = divmod(position + len(chosen), count)
        chosen += _order(count, epoch, key)[offset : offset + size - len(chosen)].tolist()
    return chosen


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, key: tuple[int | str, ...]) -> np.ndarray:
    return seeding.numpy_rng(*key, "order", epoch).permutation(count)
