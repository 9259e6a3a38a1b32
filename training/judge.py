"""The generative judge: a small language model that reads question, reference and response and writes its verdict.

The verdict is JSON with the keys "analysis" and "correctness". The analysis lays reference and answer side by side,
piece by piece, before the verdict is said: a model of half a million parameters can copy and compare two digits, but
not two numbers at a glance. For the reference 57 and the answer 58:

    { " analysis " : " 5 5 right , 7 8 wrong " , " correctness " : " wrong " }

A verdict that cannot be parsed counts as wrong.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from training import engines, notices, prompts, seeding
from training.context import StageContext
from training.document import Document
from training.encoder import Encoder
from training.loops.sample import Prompt, room
from training.pieces import sample_in_pieces
from training.recipe import Rollout
from training.rewards import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RIGHT, WRONG = "right", "wrong"
MISSING = "-"
MAX_PIECES = 6
BATCH_SIZE = 256  # verdicts in flight
_PIECE = re.compile(r"\d|[^\W\d]+|\S")


@dataclass(frozen=True)
class Verdict:
    """What the judge said. correct is False where `parsed` is False, that is, where the text is no verdict."""

    correct: bool
    analysis: str
    parsed: bool


def write_verdict(reference: str, answer: str | None, right: bool) -> str:
    """The verdict that the judge is taught to write; `right` is the label of the rule."""
    if answer is None:
        analysis = "no answer"
    else:
        pieces = zip_longest(_PIECE.findall(reference), _PIECE.findall(answer), fillvalue=MISSING)
        pairs = [f"{ours} {theirs} {RIGHT if ours == theirs else WRONG}" for ours, theirs in pieces]
        analysis = " , ".join(pairs[:MAX_PIECES])
    return f'{{ " analysis " : " {analysis} " , " correctness " : " {RIGHT if right else WRONG} " }}'


def parse_verdict(text: str) -> Verdict:
    """Read a verdict. Anything but one JSON object with both keys and a known correctness is not parsed."""
    try:
        fields = {key.strip(): value.strip() for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        return Verdict(False, "", False)
    if set(fields) != {"analysis", "correctness"} or fields["correctness"] not in (RIGHT, WRONG):
        return Verdict(False, "", False)
    return Verdict(fields["correctness"] == RIGHT, fields["analysis"], True)


def document(candidate: Sample, right: bool) -> Document:
    """A training text of the judge: the loss is on the verdict alone."""
    problem = candidate.problem
    verdict = write_verdict(problem.reference, candidate.response.answer, right)
    return Document(verdict, prompts.judge(problem, problem.reference, candidate.text))


def is_hard(candidate: Sample, right: bool) -> bool:
    """A hard negative: a wrong answer as long as the reference, or the reference in the text outside the answer."""
    if right or candidate.response.answer is None:
        return False
    answer, reference = candidate.response.answer, candidate.problem.reference
    return len(answer) == len(reference) or f" {reference} " in f" {candidate.text} "


def balance(
    candidates: Sequence[tuple[Sample, bool, str]], seed_parts: tuple[int | str, ...]
) -> list[tuple[Sample, bool, str]]:
    """As many right as wrong ones from every checkpoint, hard negatives first.

    Balanced within each checkpoint, so that the style of a strong or a weak model says nothing about the label.

    Args:
        candidates: (sample, label of the rule, name of the checkpoint) each; equal texts to a problem count once.
        seed_parts: key of the random choice.
    """
    pools: dict[tuple[str, bool], list[tuple[Sample, bool, str]]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for candidate, right, source in candidates:
        if (candidate.problem.id, candidate.text) not in seen:
            seen.add((candidate.problem.id, candidate.text))
            pools[source, right].append((candidate, right, source))
    chosen = []
    for source in sorted({source for source, _ in pools}):
        rng = seeding.numpy_rng(*seed_parts, "balance", source)
        count = min(len(pools[source, True]), len(pools[source, False]))
        for right in (True, False):
            pool = pools[source, right]
            order = sorted(rng.permutation(len(pool)), key=lambda index: not is_hard(pool[index][0], right))
            chosen += [pool[index] for index in order[:count]]
    return chosen


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    candidates: Sequence[Sample],
    context: StageContext | None = None,
) -> list[Verdict]:
    """The judge's verdict on each response, read greedily; one a candidate, in order.

    context: of the stage that asks, whose folder keeps the verdicts until it is done.
    """
    encoder = Encoder(model, tokenizer)
    asked, opening = {}, ""
    for i, each in enumerate(candidates):
        prompt = Prompt(each.problem, prompts.judge(each.problem, each.problem.reference, each.text))
        ids, opening = encoder.prompt(prompt.turns)
        if room(encoder, len(ids)) >= 1:
            asked[i] = prompt
    if len(asked) < len(candidates):
        notices.warn(
            "long verdicts",
            f"{len(candidates) - len(asked)} of {len(candidates)} responses are too long for the judge, and count as wrong",
        )
    rollout = Rollout() if context is None else context.recipe.rollout
    with closing(engines.connect(rollout, model, tokenizer)) as engine:
        written = sample_in_pieces(
            context,
            [each.text for each in candidates],
            engine,
            list(asked.values()),
            temperature=0.0,
            max_new_tokens=longest_verdict(encoder, opening, candidates),
            seed_parts=("judge",),
            batch_size=BATCH_SIZE,
        )
    read = dict(zip(asked, (parse_verdict(completion.text) for completion in written), strict=True))
    return [read.get(i, Verdict(False, "", False)) for i in range(len(candidates))]


def longest_verdict(encoder: Encoder, opening: str, candidates: Sequence[Sample]) -> int:
    """Tokens of the longest verdict that the judge is taught to write about any of the candidates, with the end of its turn.

    It depends on the tokenizer: a limit of one tokenizer would cut the verdicts of another, which then parse as none.
    """
    verdicts = (
        write_verdict(each.problem.reference, each.response.answer, right)
        for each in candidates
        for right in (True, False)
    )
    return max((len(encoder.response(verdict, opening)) for verdict in verdicts), default=1)
