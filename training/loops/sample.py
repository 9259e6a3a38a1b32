"""Sampling responses. What is drawn depends on (seed, problem, sample) alone, never on the order of a batch.

Every response has one key; its n-th token is chosen by the n-th number of a counter-based generator of that key, as the
token at which the cumulated probability passes that number. So nothing has to be saved for a resume, and any number of
machines draw the same responses.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.integrations import transformers as integration
from training import notices, seeding
from training.encoder import Encoder
from training.errors import UserError
from training.model import is_patched
from training.prompts import Turns
from training.tasks.problem import Problem


@dataclass(frozen=True)
class Prompt:
    """A problem and the turns that stand before the response."""

    problem: Problem
    turns: Turns


@dataclass(frozen=True)
class Completion:
    """One sampled response. token_ids ends with a token that ends responses where `finished`.

    text: the response without that token; where the prompt has opened the thinking, its tag stands in the text too.

    routing: with record_routing, the experts chosen for every token of prompt and response but the last,
    (layers, tokens, experts per token) int16; None otherwise.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    sample_id: int
    finished: bool
    routing: Tensor | None = None


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int,
    seed_parts: tuple[int | str, ...],
    batch_size: int = 384,
    record_routing: bool = False,
) -> list[Completion]:
    """Samples `samples` responses to every prompt.

    Args:
        prompts: any number.
        temperature: 0 takes the most probable token. top_p: the smallest set of tokens with at least this probability.
        max_new_tokens: a response is cut there, and then it is not `finished`; where the model has no more positions, too.
        seed_parts: key of the draw; with the problem's id and the sample's number it decides every token.
        batch_size: responses in flight.
        record_routing: keep the experts that the routers chose, for replay; a dense model has none.

    Returns:
        len(prompts) * samples completions in the order of `prompts`, the samples of a prompt side by side.

    Raises:
        UserError: a prompt is longer than the model can read.
    """
    was_training = model.training
    model.eval()
    encoder = Encoder(model, tokenizer)
    jobs = [
        (prompt.problem, *encoder.prompt(prompt.turns), number)
        for prompt in prompts
        for number in range(samples)
    ]
    # Prompts of one length share a batch, so that nothing is padded. Keyed draws make the order irrelevant.
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, (problem, ids, _, _) in enumerate(jobs):
        if room(encoder, len(ids)) < 1:
            raise UserError(
                f"problem {problem.id} of {problem.task}: its prompt has {len(ids)} tokens, and the model reads no more "
                f"than {encoder.positions}"
            )
        by_length[len(ids)].append(i)
    found: dict[int, Completion] = {}
    for length, group in by_length.items():
        most = min(max_new_tokens, room(encoder, length))
        for first in range(0, len(group), batch_size):
            chosen = group[first : first + batch_size]
            keys = [seeding.key(*seed_parts, jobs[i][0].id, jobs[i][3]) for i in chosen]
            choose = _Choice(uniforms(keys, most), temperature, top_p)
            drawn = _generate(model, [jobs[i][1] for i in chosen], choose, encoder.stop_ids, record_routing)
            for i, (token_ids, routing) in zip(chosen, drawn, strict=True):
                problem, prompt_ids, opening, number = jobs[i]
                finished = token_ids[-1] in encoder.stop_ids
                text = encoder.text(token_ids[:-1] if finished else token_ids, opening)
                found[i] = Completion(
                    problem, tuple(prompt_ids), tuple(token_ids), text, number, finished, routing
                )
    model.train(was_training)
    completions = [found[i] for i in range(len(jobs))]
    _warn_of_cut(completions, encoder, max_new_tokens)
    return completions


def room(encoder: Encoder, length: int) -> int:
    """The longest response that fits behind a prompt of `length` tokens; its last token is not read."""
    return sys.maxsize if encoder.positions is None else encoder.positions - length + 1


def _warn_of_cut(completions: list[Completion], encoder: Encoder, max_new_tokens: int) -> None:
    """Says that most responses are cut: what reads them sees no answer."""
    cut = sum(not completion.finished for completion in completions)
    if 2 * cut > len(completions):
        ends = ", ".join(repr(encoder.tokenizer.decode([each])) for each in encoder.stop_ids) or "nothing"
        notices.warn(
            "cut",
            f"{cut} of {len(completions)} responses did not end within {max_new_tokens} tokens and were cut: raise "
            f"max_new_tokens, or see whether this model ends its turns otherwise (here {ends} ends one)",
        )


def uniforms(keys: Sequence[int], count: int) -> Tensor:
    """(len(keys), count) float64 in [0, 1): number n of a key is SplitMix64's output at counter key + n * golden ratio."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = np.array(keys, dtype=np.uint64)[:, None] + counter
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token of each row at which the cumulated probability passes `uniform`.

    logits (B, V); uniform (B,) float64 in [0, 1). With top_p < 1 only the most probable tokens whose probabilities sum
    to at least top_p stay. temperature 0: the most probable token (the lowest index among equals).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        probs = torch.zeros_like(probs).scatter(
            -1, order, ordered.masked_fill((before >= top_p) & (before > 0), 0.0)
        )
    cumulated = probs.cumsum(dim=-1)
    # Scaled by the total, which is 1 but for rounding, so that a token of probability 0 is never chosen.
    passed = cumulated > (uniform.to(probs.device) * cumulated[:, -1]).unsqueeze(-1)
    return passed.int().argmax(dim=-1)


@dataclass(frozen=True)
class _Choice:
    """How the tokens of a batch are chosen: uniform (rows, max_new_tokens), temperature and top_p."""

    uniform: Tensor
    temperature: float
    top_p: float

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        return choose_tokens(logits, self.uniform[rows.cpu(), step], self.temperature, self.top_p)


def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    choose: _Choice,
    stop_ids: tuple[int, ...],
    record_routing: bool,
) -> list[tuple[list[int], Tensor | None]]:
    """Token ids (the one that ends it included) and routing of a response to every prompt; all have the same length.

    Equal prompts are read once, and a response that has ended leaves the batch.
    """
    distinct = list({tuple(prompt): None for prompt in prompts})
    position = {prompt: i for i, prompt in enumerate(distinct)}
    source = torch.tensor([position[tuple(prompt)] for prompt in prompts], device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # the prompts whose responses are still growing
    ids = torch.tensor(distinct, device=model.device)
    cache = DynamicCache(config=model.config)
    tokens: list[list[int]] = [[] for _ in prompts]
    growing = [rows]
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=model.device)
    recording = integration.record_routing(model) if record_routing and is_patched(model) else nullcontext()
    with recording as record:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            source, -1
        ]
        cache.batch_select_indices(source)
        for step in range(choose.uniform.shape[1]):
            chosen = choose(logits, rows, step)
            for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
                tokens[row].append(token)
            going = (~torch.isin(chosen, stops)).nonzero().squeeze(1)
            if len(going) == 0 or step + 1 == choose.uniform.shape[1]:
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                rows, chosen = rows[going], chosen[going]
            growing.append(rows)
            logits = model(input_ids=chosen.unsqueeze(1), past_key_values=cache, use_cache=True).logits[:, -1]
    if record is None:
        return [(row, None) for row in tokens]
    return list(zip(tokens, _by_row(record.calls, source.cpu(), growing, tokens), strict=True))


def _by_row(
    calls: list[list[Tensor]], source: Tensor, growing: list[Tensor], tokens: list[list[int]]
) -> list[Tensor]:
    """The recorded experts of every response, (layers, tokens of prompt and response but the last, experts per token).

    calls[layer]: the prompts' (distinct prompts * length, K), then one (rows still growing, K) for every further token.
    """
    prompts = torch.stack([layer[0] for layer in calls]).cpu().unflatten(1, (int(source.max()) + 1, -1))
    layers, _, length, top_k = prompts.shape
    routing = prompts.new_zeros((layers, len(tokens), length + len(growing) - 1, top_k))
    routing[:, :, :length] = prompts[:, source]
    for step, rows in enumerate(growing[1:]):
        routing[:, rows.cpu(), length + step] = torch.stack([layer[step + 1] for layer in calls]).cpu()
    return [routing[:, row, : length + len(ids) - 1].clone() for row, ids in enumerate(tokens)]
