"""Next-token training: pretraining and every supervised stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import r1kernels
from r1kernels.integrations import transformers as integration
from training import seeding
from training.context import StageContext
from training.errors import UserError
from training.loops.optim import Optimizer, learning_rate, save_due
from training.model import StepLoad
from training.recipe import NextToken

MICRO_BATCH_TOKENS = 4096  # padded tokens in one forward pass: what fits a core's cache is fastest


@dataclass(frozen=True)
class Document:
    """A training text. With a prompt_text, that text stands before it and carries no loss; eos is learnt at its end."""

    text: str
    prompt_text: str = ""


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
        model: dense, or DeepSeek-V3 (then its router bias is updated once a step).
        documents: at least one. A pass over them is in an order keyed by (seed, stage, title, epoch).
        config: steps (or epochs where steps is 0), batch_size, lr and so on.
        context: where metrics and resume points go; `context.stage` resumes a run that was cut off.
        title: names the training where one stage has several; part of the key of the order.

    Returns:
        The last metrics, with the number of documents cut at config.max_length as `truncated`.
    """
    if not documents:
        raise UserError(f"{context.name}: there are no documents to train on")
    rows, truncated = _encode(tokenizer, documents, config.max_length)
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
            metrics = _step(
                model, optimizer, [rows[i] for i in chosen], tokenizer.pad_token_id, config, step, steps
            )
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
            context.stage.log(step=step, **metrics)
            bar.advance(loss=metrics["loss"])
            if save_due(step + 1, steps, config.save_every):
                context.stage.save_state(step + 1, optimizer.tensors(), optimizer.counters())
    model.eval()
    return {**metrics, "steps": steps, "truncated": truncated}


def _step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    rows: list[tuple[list[int], int]],
    pad: int,
    config: NextToken,
    step: int,
    steps: int,
) -> dict[str, float]:
    total = sum(len(ids) - max(1, prompt) for ids, prompt in rows)
    loss, tokens = 0.0, 0
    load = StepLoad(model)
    for batch in _micro_batches(rows):
        ids, mask, targets = (part.to(model.device) for part in _pad(batch, pad))
        with load.counting(mask):
            # Padding stands on the right, where causal attention never sees it: no attention mask is needed.
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = integration.output_head(model)
        logp = r1kernels.linear_logprobs(hidden[:, :-1], targets=targets, **head._asdict())
        part = -logp.sum() / total
        part.backward()
        loss += float(part.detach())
        tokens += int(mask.sum())
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
        "tokens": tokens,
        "expert_load": load.max_over_mean(),
        "skipped": optimizer.skipped,
    }


def _encode(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], max_length: int
) -> tuple[list[tuple[list[int], int]], int]:
    """Token ids with bos and eos, the number of leading ids without loss, and how many documents were cut."""
    texts = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    prompts = tokenizer([document.prompt_text for document in documents], add_special_tokens=False)[
        "input_ids"
    ]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows, truncated = [], 0
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [bos, *prompt, *text, eos]
        truncated += len(ids) > max_length
        rows.append((ids[:max_length], 1 + len(prompt) if prompt else 0))
    rows = [(ids, prompt) for ids, prompt in rows if len(ids) > max(1, prompt)]
    if not rows:
        raise UserError(f"max_length: {max_length} tokens leave nothing to learn of any document")
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


def _micro_batches(rows: list[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """The rows by length, in pieces of at most MICRO_BATCH_TOKENS padded tokens, so that little padding is computed."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    piece: list[tuple[list[int], int]] = []
    for row in ordered:
        if piece and len(row[0]) * (len(piece) + 1) > MICRO_BATCH_TOKENS:
            yield piece
            piece = []
        piece.append(row)
    yield piece


def _pad(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, L) padded on the right, mask (B, L), targets (B, L - 1) with -100 where there is no loss."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    targets = torch.full((len(rows), length - 1), -100, dtype=torch.int64)
    for row, (tokens, prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        first = max(1, prompt)
        targets[row, first - 1 : len(tokens) - 1] = ids[row, first : len(tokens)]
    return ids, mask, targets
