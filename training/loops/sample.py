"""Sampling responses: problems and their turns in, completions out; an engine draws (training.engines).

What is drawn depends on (seed, problem, sample) alone, never on the order of a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from training import notices, seeding
from training.encoder import Encoder
from training.engines import Engine, Kept, Request, SamplingParams
from training.errors import UserError
from training.parallel import ranks
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
    logp, version, routing, kept: as in `engines.Output`.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    sample_id: int
    finished: bool
    logp: tuple[float, ...] = ()
    version: int = 0
    routing: Tensor | None = None
    kept: Kept | None = None


def sample(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int,
    seed_parts: tuple[int | str, ...],
    batch_size: int = 384,
    record_routing: bool = False,
    record_kept: bool = False,
) -> list[Completion]:
    """Samples `samples` responses to every prompt.

    Args:
        prompts: any number.
        temperature, top_p, top_k: as in `engines.SamplingParams`.
        max_new_tokens: a response is cut there, and then it is not `finished`; where the model has no more positions, too.
        seed_parts: key of the draw; with the problem's id and the sample's number it decides every token.
        batch_size: responses in flight.
        record_routing: keep the experts that the routers chose, for replay; a dense model has none.
        record_kept: keep the tokens that top_p and top_k left to draw from.

    Returns:
        len(prompts) * samples completions in the order of `prompts`, the samples of a prompt side by side.

    Raises:
        UserError: a prompt is longer than the model can read.
    """
    encoder = engine.encoder
    params = SamplingParams(
        temperature, top_p, top_k, encoder.stop_ids, batch_size, record_routing, record_kept
    )
    requests: list[Request] = []
    jobs: list[tuple[Problem, str, int]] = []
    read = ranks.spread(lambda own: encoder.prompts(each.turns for each in own), prompts)
    for prompt, (ids, opening) in zip(prompts, read, strict=True):
        problem = prompt.problem
        if room(encoder, len(ids)) < 1:
            raise UserError(
                f"problem {problem.id} of {problem.task}: its prompt has {len(ids)} tokens, and the model reads no more "
                f"than {encoder.positions}"
            )
        for number in range(samples):
            key = seeding.key(*seed_parts, problem.id, number)
            requests.append(Request(tuple(ids), key, min(max_new_tokens, room(encoder, len(ids)))))
            jobs.append((problem, opening, number))
    completions = []
    for (problem, opening, number), request, drawn in zip(
        jobs, requests, engine.sample(requests, params), strict=True
    ):
        text = encoder.text(drawn.token_ids[:-1] if drawn.finished else drawn.token_ids, opening)
        completions.append(
            Completion(
                problem,
                request.prompt_ids,
                drawn.token_ids,
                text,
                number,
                drawn.finished,
                drawn.logp,
                drawn.version,
                drawn.routing,
                drawn.kept,
            )
        )
    _warn_of_cut(completions, encoder, max_new_tokens)
    return completions


def room(encoder: Encoder, length: int) -> int:
    """The longest response that fits behind a prompt of `length` tokens; its last token is not read."""
    return sys.maxsize if encoder.positions is None else encoder.positions - length + 1


def _warn_of_cut(completions: list[Completion], encoder: Encoder, max_new_tokens: int) -> None:
    """Says that most responses are cut, and by what: what reads them sees no answer."""
    cut = [completion for completion in completions if not completion.finished]
    if 2 * len(cut) <= len(completions):
        return
    ends = ", ".join(repr(encoder.tokenizer.decode([each])) for each in encoder.stop_ids) or "nothing"
    # where no prompt leaves room for max_new_tokens, a higher one would change nothing
    most = min(max_new_tokens, max(room(encoder, len(completion.prompt_ids)) for completion in cut))
    longer, why = "raise max_new_tokens", ""
    if most < max_new_tokens:
        longer = "take a model that reads more, or shorter prompts"
        why = f", all that its {encoder.positions} positions leave behind a prompt,"
    notices.warn(
        "cut",
        f"{len(cut)} of {len(completions)} responses did not end within {most} tokens{why} and were cut: {longer}, or see "
        f"whether this model ends its turns otherwise (here {ends} ends one)",
    )
