"""Next-token training: pretraining and every supervised stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import notices, seeding
from training.context import StageContext
from training.document import Document
from training.encoder import Encoder
from training.errors import UserError
from training.loops.batch import Row, head_logprobs, lay_out, pieces, states, worth_sharing
from training.loops.optim import Optimizer, learning_rate, save_due
from training.model import StepLoad, shares_prefixes
from training.parallel import ranks
from training.profile import profiled
from training.recipe import NextToken


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    config: NextToken,
    context: StageContext,
    *,
    title: str = "",
) -> dict[str, float]:
    """Trains `model` in place by the mean negative log-prob of the tokens that carry a loss.

        loss of a step = - sum of log p(token) over the step's documents / number of those tokens

    Args:
        model: dense, or a mixture (where its routers have a selection bias, that is updated once a step).
        documents: at least one. A pass over them is in an order keyed by (seed, stage, title, epoch).
        config: steps (or epochs where steps is 0), batch_size, lr and so on.
        context: where metrics and resume points go; `context.stage` resumes a run that was cut off.
        title: names the training where one stage has several; part of the key of the order.

    Returns:
        The last metrics, with the number of documents that were cut as `truncated`; a warning says so, too.
    """
    if not documents:
        raise UserError(f"{context.name}: there are no documents to train on")
    encoder = Encoder(model, tokenizer)
    rows, truncated = _encode(encoder, documents, config.max_length, context.name)
    per_epoch = len(rows) / config.batch_size
    steps = config.steps or max(1, round(config.epochs * per_epoch))
    optimizer = Optimizer(model, weight_decay=config.weight_decay, grad_clip=config.grad_clip)
    state = context.stage.load_state()
    start = 0
    if state is not None:
        start = state.step
        optimizer.restore(state.tensors, state.counters)
    metrics: dict[str, float] = {}
    model.train()
    with context.progress.bar(steps, start, title or context.name) as bar:
        for step in range(start, steps):
            began = time.perf_counter()
            chosen = _batch(len(rows), config.batch_size, step, (context.recipe.seed, context.name, title))
            with (
                seeding.torch_seed(
                    context.recipe.seed, context.name, title, "dropout", step, *ranks.own_key()
                ),
                profiled(context.stage.path, step, start, steps),
            ):
                at_once = [rows[i] for i in chosen]
                shared = context.recipe.shared_prefix and worth_sharing(at_once) and shares_prefixes(model)
                metrics = _step(model, optimizer, at_once, encoder.pad_id, shared, config, step, steps)
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
            context.stage.log(step=step, **metrics)
            bar.advance(loss=metrics["loss"])
            if save_due(step + 1, steps, config.save_every, context.stage.unsaved_seconds):
                context.stage.save_state(step + 1, optimizer.tensors(), optimizer.counters())
    model.eval()
    if any(document.prompt for document in documents):
        encoder.note_ends()
    return {**metrics, "steps": steps, "truncated": truncated}


def _step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    rows: list[Row],
    pad: int,
    shared: bool,
    config: NextToken,
    step: int,
    steps: int,
) -> dict[str, float]:
    total = sum(len(row.targets) for row in rows)
    loss = 0.0
    load = StepLoad(model)
    for piece in pieces(rows, config.micro_batch_tokens, shared):
        batch = lay_out([rows[i] for i in piece], pad, model.device, shared)
        with load.counting(batch.counts):
            hidden = states(model, batch)
        part = -head_logprobs(model, batch, hidden).sum() / total
        part.backward()
        loss += float(part.detach())
    loss = ranks.sums({"loss": loss})["loss"]
    load.sum()
    lr = learning_rate(
        step, steps, lr=config.lr, lr_end=config.lr_end, schedule="cosine", warmup=config.warmup
    )
    norm, taken = optimizer.step(loss, lr)
    if taken:
        load.update_bias(config.bias_rate)
    return {
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens": sum(len(row.ids) for row in rows),
        "expert_load": load.max_over_mean(),
        "skipped": optimizer.skipped,
    }


def _encode(
    encoder: Encoder, documents: Sequence[Document], max_length: int, stage: str
) -> tuple[list[Row], int]:
    """The documents as rows, and how many of them were cut: at max_length (0: none) and at the positions of the model."""
    most = min(length for length in (max_length, encoder.positions, sys.maxsize) if length)
    rows, longest, truncated = [], 0, 0
    for document in documents:
        if document.prompt:
            prompt, opening = encoder.prompt(document.prompt)
            ids = prompt + encoder.response(document.text, opening)
            first = max(1, len(prompt))
        else:
            ids, first = encoder.document(document.text), 1  # nothing predicts the first token
        truncated += len(ids) > most
        longest = max(longest, len(ids))
        rows.append(Row(tuple(ids[:most]), first, tuple(ids[first:most])))
    if truncated:
        notices.warn(
            "documents",
            f"{truncated} of {len(rows)} documents were cut at {most} tokens and never show how they end; the longest has "
            f"{longest}: raise {stage}.max_length or leave them out",
        )
    rows = [row for row in rows if row.targets]
    if not rows:
        raise UserError(f"max_length: {most} tokens leave nothing to learn of any document")
    return rows, truncated


def _batch(count: int, size: int, step: int, key: tuple[int | str, ...]) -> list[int]:
    """Indices of the documents of a step: pass after pass over all of them, each in its own keyed order."""
    chosen: list[int] = []
    position = step * size
    while len(chosen) < size:
        epoch, offset = divmod(position + len(chosen), count)
        order = seeding.numpy_rng(*key, "order", epoch).permutation(count)
        chosen += order[offset : offset + size - len(chosen)].tolist()
    return chosen
