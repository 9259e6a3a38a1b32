"""Reward models: the policy's own architecture with a scalar head, trained on sampled and labelled responses.

helpful   pairwise (Bradley-Terry): loss = -log sigmoid(r(chosen) - r(rejected)), on prompt and summary;
safety    pointwise: loss = binary cross-entropy of sigmoid(r) against the label, on prompt and whole response.

Both are DeepSeek-R1's (arXiv 2501.12948v2, equations 5 and 6). The score that GRPO sees lies in (0, 1):
sigmoid(r - offset). Bradley-Terry leaves r free up to a constant, so the helpful model's offset is the mean reward
of its training pairs; the safety model's is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from training import notices, prompts, seeding
from training.context import StageContext
from training.encoder import Encoder
from training.errors import UserError
from training.loops.batch import micro_batches, padded_pieces
from training.loops.optim import Optimizer, learning_rate, save_due, unfinished_warmup
from training.model import prepare
from training.parallel import ranks
from training.parallel.shard import bring_up_to_date, forward, learner_of
from training.recipe import NextToken
from training.tasks.problem import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PASS_TOKENS = 8192  # padded ones, in one forward pass without gradients


@dataclass(frozen=True)
class Pair:
    """Two texts to one problem: the oracle found the first one helpful and the second one not."""

    problem: Problem
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Point:
    """A text with the label of the oracle."""

    problem: Problem
    text: str
    label: bool


Labelled = Pair | Point
Reader = Callable[[Problem, str], list[int]]  # `encode` with an encoder


def from_language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The body of a causal language model under a new scalar head, which starts at 0 (so nothing is drawn)."""
    config = type(model.config).from_dict(
        model.config.to_dict() | {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
    )
    with torch.random.fork_rng(devices=[]):
        reward_model = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    reward_model.base_model.load_state_dict(model.base_model.state_dict())
    torch.nn.init.zeros_(reward_model.score.weight)
    reward_model.config.reward_offset = 0.0
    return prepare(reward_model.to(model.device))


def rewards(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[tuple[Problem, str]]
) -> torch.Tensor:
    """The scalar rewards of (problem, text) items, float32 (N,); read at the token that ends the turn, behind the text."""
    encoder = Encoder(model, tokenizer)
    return _rewards(model, [encode(encoder, *item) for item in items], encoder.pad_id)


def _rewards(model: PreTrainedModel, rows: Sequence[list[int]], pad: int) -> torch.Tensor:
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    last = torch.tensor([len(tokens) - 1 for tokens in rows], device=model.device)

    def score() -> torch.Tensor:
        # Padding stands on the right, where causal attention never sees it: no attention mask is needed.
        hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        reward: torch.Tensor = model.score(hidden[torch.arange(len(rows), device=model.device), last])
        return reward

    return forward(model, score).float().squeeze(-1)


@torch.no_grad()
def _scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[tuple[Problem, str]]
) -> list[float]:
    """The rewards of items, in passes with little padding."""
    encoder = Encoder(model, tokenizer)
    rows = [encode(encoder, *item) for item in items]
    found = [0.0] * len(rows)
    for piece in micro_batches([len(row) for row in rows], PASS_TOKENS):
        scored = _rewards(model, [rows[i] for i in piece], encoder.pad_id).tolist()
        for i, reward in zip(piece, scored, strict=True):
            found[i] = reward
    return found


def encode(encoder: Encoder, problem: Problem, text: str) -> list[int]:
    """Token ids of a problem and a response, with the end of the turn; of more than the model reads, the latest."""
    prompt, opening = encoder.prompt(prompts.chat(problem))
    ids = prompt + encoder.response(text, opening)
    if encoder.positions is not None and len(ids) > encoder.positions:
        notices.warn(
            "long responses", f"a response is scored by its last {encoder.positions} of {len(ids)} tokens"
        )
        ids = ids[-encoder.positions :]
    return ids


def pairwise_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected); rewards of shape (N,)."""
    return -F.logsigmoid(chosen - rejected).mean()


def pointwise_loss(reward: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy of sigmoid(reward) against labels in {0, 1}; both of shape (N,)."""
    return F.binary_cross_entropy_with_logits(reward, label)


def _loss(model: PreTrainedModel, read: Reader, batch: Sequence[Labelled], pad: int) -> torch.Tensor:
    """The loss of a batch of pairs (helpful) or of points (safety)."""
    texts = [_items(each) for each in batch]
    # of pairs first the chosen texts, then the rejected ones
    found = _rewards(model, [read(*item) for column in zip(*texts, strict=True) for item in column], pad)
    if isinstance(batch[0], Pair):
        return pairwise_loss(*found.chunk(2))
    label = torch.tensor([float(point.label) for point in _points(batch)], device=model.device)
    return pointwise_loss(found, label)


def _points(data: Sequence[Labelled]) -> list[Point]:
    return [each for each in data if isinstance(each, Point)]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: Sequence[Labelled],
    config: NextToken,
    context: StageContext,
) -> dict[str, float]:
    """Train `model` in place on pairs or points and set its offset; resumes from context.stage.

    config: steps, or epochs where steps is 0; batch_size in pairs or points; lr falls on a cosine to lr_end.
    Returns the metrics of the last step. The router bias, if there is one, stays as it is.
    """
    if not data:
        raise UserError(f"{context.name}: no labelled responses to learn from; raise its prompts or samples")
    steps = config.steps or max(1, round(config.epochs * len(data) / config.batch_size))
    if text := unfinished_warmup(context.name, config.warmup, steps):
        notices.warn("warm-up", text)
    learner = learner_of(model, context.recipe)
    optimizer = Optimizer(
        learner, weight_decay=config.weight_decay, grad_clip=config.grad_clip, kind=config.optimizer
    )
    state = context.stage.load_state()
    start = state.step if state else 0
    if state:
        optimizer.restore(state)
    metrics: dict[str, float] = {}
    encoder = Encoder(model, tokenizer)
    read = cache(partial(encode, encoder))  # a text comes once an epoch
    learner.train()
    with context.progress.bar(steps, start, context.name) as bar:
        for step in range(start, steps):
            batch = [
                data[i]
                for i in _batch(len(data), config.batch_size, step, (context.recipe.seed, context.name))
            ]
            with seeding.torch_seed(context.recipe.seed, context.name, "dropout", step, *ranks.own_key()):
                part = _backward(learner, read, batch, encoder.pad_id, config.micro_batch_tokens)
            lr = learning_rate(
                step, steps, lr=config.lr, lr_end=config.lr_end, schedule="cosine", warmup=config.warmup
            )
            loss, norm, _ = optimizer.step(part, lr, unsaved_seconds=context.stage.unsaved_seconds)
            metrics = {"loss": loss, "lr": lr, "grad_norm": norm, "skipped": optimizer.skipped}
            context.stage.log(step=step, **metrics)
            bar.advance(loss=metrics["loss"])
            if save_due(step + 1, steps, config.save_every, optimizer.unsaved_seconds):
                context.stage.save_state(step + 1, optimizer.tensors(), optimizer.counters())
    bring_up_to_date(model, learner)
    model.eval()
    model.config.reward_offset = _mean_reward(model, tokenizer, data)
    return {**metrics, "steps": steps}


def _backward(model: PreTrainedModel, read: Reader, batch: Sequence[Labelled], pad: int, most: int) -> float:
    """This rank's part of the loss of a batch, whose gradient is added in passes of at most `most` padded tokens."""
    lengths = [sum(len(read(*item)) for item in _items(each)) for each in batch]
    order = sorted(range(len(batch)), key=lengths.__getitem__)  # little padding on any rank
    own = [order[i] for i in ranks.share([lengths[i] for i in order])]
    total = 0.0
    for piece in padded_pieces(micro_batches([lengths[i] for i in own], most), model):
        labelled = [batch[own[i]] for i in piece] or batch[:1]  # an empty one counts nothing
        part = _loss(model, read, labelled, pad) * (len(piece) / len(batch))
        part.backward()
        total += part.item()
    return total


def _items(labelled: Labelled) -> list[tuple[Problem, str]]:
    texts = (labelled.chosen, labelled.rejected) if isinstance(labelled, Pair) else (labelled.text,)
    return [(labelled.problem, text) for text in texts]


def _batch(count: int, size: int, step: int, key: tuple[int | str, ...]) -> list[int]:
    """Indices of a step's data: pass after pass, each in its own keyed order; a short last batch is not filled."""
    epoch, position = divmod(step, max(1, math.ceil(count / size)))
    order = seeding.numpy_rng(*key, "order", epoch).permutation(count)
    return order[position * size : (position + 1) * size].tolist()


def _mean_reward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: Sequence[Labelled]
) -> float:
    """Mean reward of all texts of the pairs; 0 for points, whose reward has its zero where it belongs."""
    items = [item for each in data if isinstance(each, Pair) for item in _items(each)]
    found = ranks.spread(partial(_scores, model, tokenizer), items)
    return fmean(found) if found else 0.0


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: Sequence[Labelled]) -> float:
    """Share of pairs whose chosen text has the higher reward, or of points on the right side of 1/2; nan without data."""

    def verdicts(own: Sequence[Labelled]) -> list[bool]:
        found = iter(_scores(model, tokenizer, [item for each in own for item in _items(each)]))
        return [
            next(found) > next(found) if isinstance(each, Pair) else (next(found) > 0) == each.label
            for each in own
        ]

    return sum(ranks.spread(verdicts, data)) / len(data) if data else float("nan")


def scorer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Callable[[Sequence[tuple[Problem, str]]], list[float]]:
    """The model as a preference reward: (problem, text) items -> scores in (0, 1)."""

    def score(items: Sequence[tuple[Problem, str]]) -> list[float]:
        rewards = torch.tensor(_scores(model, tokenizer, items))
        return torch.sigmoid(rewards - model.config.reward_offset).tolist()

    return score


def make_pairs(
    labelled: Sequence[tuple[Problem, str, bool]], most: int, seed_parts: tuple[int | str, ...]
) -> list[Pair]:
    """Pairs of a helpful and an unhelpful text to the same problem, at most `most` a problem.

    Half of a problem's pairs are those with the most words in common, the others are drawn: "it is paris" against
    "it is oslo" teaches the fact, against "i cannot tell it" only the tone.

    labelled: (problem, text, label) in any order; equal texts of a problem count once.
    """
    pools: dict[str, dict[bool, dict[str, None]]] = {}
    problems = {problem.id: problem for problem, _, _ in labelled}
    for problem, text, label in labelled:
        pools.setdefault(problem.id, {True: {}, False: {}})[label][text] = None
    pairs = []
    for name, pool in pools.items():
        combinations = [(chosen, rejected) for chosen in pool[True] for rejected in pool[False]]
        drawn = seeding.numpy_rng(*seed_parts, "pairs", name).permutation(len(combinations)).tolist()
        close = sorted(drawn, key=lambda index: -_overlap(*combinations[index]))[: (most + 1) // 2]
        order = close + [index for index in drawn if index not in close]
        pairs += [Pair(problems[name], *combinations[index]) for index in order[:most]]
    return pairs


def _overlap(first: str, second: str) -> float:
    """Words in common / words of either text."""
    one, other = set(first.split()), set(second.split())
    return len(one & other) / max(1, len(one | other))


def make_points(
    labelled: Sequence[tuple[Problem, str, bool]], seed_parts: tuple[int | str, ...]
) -> list[Point]:
    """Labelled texts, each once a problem, as many safe as unsafe ones."""
    distinct = {(problem.id, text): Point(problem, text, label) for problem, text, label in labelled}
    by_label = {flag: [point for point in distinct.values() if point.label is flag] for flag in (True, False)}
    count = min(len(points) for points in by_label.values())
    chosen = []
    for flag, points in by_label.items():
        order = seeding.numpy_rng(*seed_parts, "points", int(flag)).permutation(len(points))[:count]
        chosen += [points[index] for index in order]
    return chosen
