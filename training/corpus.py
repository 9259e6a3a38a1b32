"""The pretraining corpus: documents of the tasks behind the prompts that later stages use, good ones a minority."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from training import prompts, seeding
from training.config import unknown
from training.document import Document
from training.errors import UserError
from training.prompts import Turns
from training.tasks import arithmetic, general

KINDS = (*arithmetic.DOCUMENT_KINDS, "general")
SHOTS = 2  # worked examples in a few-shot document


def documents(
    seed: int, count: int, *, mix: Mapping[str, float], steps: int = 4, largest: int = 87
) -> list[Document]:
    """Draw `count` documents.

    Args:
        seed: the seed of the run.
        mix: share of each kind (arithmetic.corpus_document, and "general"); they are normalised to a sum of 1.
        steps, largest: options of the arithmetic task.
    """
    check_mix(mix)
    kinds = list(mix)
    shares = np.array([mix[kind] for kind in kinds], dtype=np.float64)
    rng = seeding.numpy_rng(seed, "base", "corpus")
    chosen = rng.choice(len(kinds), size=count, p=shares / shares.sum())
    return [_document(rng, kinds[i], steps, largest) for i in chosen]


def check_mix(mix: Mapping[str, float]) -> None:
    """Raises a UserError where `base.corpus` names an unknown kind of document, or its shares are none."""
    for kind in mix:
        if kind not in KINDS:
            raise UserError(f"base.corpus: {unknown('kind of documents', kind, KINDS)}")
    if not mix or min(mix.values()) < 0 or not any(mix.values()):
        raise UserError(f"base.corpus: shares must be non-negative and not all 0, got {dict(mix)}")


def _document(rng: np.random.Generator, kind: str, steps: int, largest: int) -> Document:
    if kind == "general":
        return general.corpus_document(rng)
    problem, response = arithmetic.corpus_document(rng, kind, steps, largest)
    if kind == "series":
        return Document(response)
    if kind == "reflect":
        return _whole(prompts.reflect(problem), response)
    if kind == "few_shot":
        examples = arithmetic.ArithmeticTask(steps, largest).worked_examples(problem.language)
        order = rng.permutation(len(examples))[:SHOTS]
        return _whole(prompts.few_shot(problem, [examples[i] for i in order]), response)
    return _whole(prompts.zero(problem) if rng.random() < 0.6 else prompts.chat(problem), response)


def _whole(turns: Turns, response: str) -> Document:
    """Prompt and response as one text, all of which is learnt."""
    return Document(f"{prompts.plain(turns)} {response}")
