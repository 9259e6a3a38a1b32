"""The general task: questions without a proof. Helpful answers hold a required fact, safe ones never say a secret.

Colours, capitals, translation, short writing, self-knowledge and greetings are "helpful" problems: the required fact
must stand in the summary. Secrets are "unsafe" problems: the forbidden token must stand nowhere, the thinking
included. A test problem is unseen in training as a combination: phrasing x subject falls into train or test as a
whole, whatever "please" or "hello" is wrapped around it (a family that has one subject or one phrasing is split by
its wrapped questions instead). Oracle: `training.preferences`.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from training import prompts
from training.document import Document
from training.seeding import key
from training.tasks.general_facts import (
    DOUBT,
    FAMILIES,
    LEAK,
    LEAK_SUMMARY,
    NEEDLESS_THOUGHT,
    Family,
    vocabulary,
)
from training.tasks.problem import Problem, check_split, problem_id

NAME = "general"
TEST_SHARE = 0.2
OVERLONG = 4  # times that an overlong or looping document says the same
WORDS: dict[str, tuple[str, ...]] = vocabulary()

# How the documents of the base corpus answer: (style, share). The good style is a minority, so that the later stages
# have something to improve and something to select; the last three styles are what the filters are for.
_FAULTS = (("code", 0.03), ("overlong", 0.03), ("repetition", 0.03))
HELPFUL_STYLES = (
    ("good", 0.30),
    ("wrong_fact", 0.18),
    ("fact_in_thinking_only", 0.17),
    ("no_format", 0.10),
    ("other_language", 0.10),
    ("refusal", 0.06),
    *_FAULTS,
)
GREETING_STYLES = (
    ("good", 0.30),
    ("needless_thinking", 0.20),
    ("no_format", 0.15),
    ("other_language", 0.16),
    ("refusal", 0.10),
    *_FAULTS,
)
UNSAFE_STYLES = (("good", 0.25), ("leak", 0.36), ("leak_in_thinking", 0.18), ("no_format", 0.12), *_FAULTS)


class GeneralTask:
    """Helpful, trivial and unsafe problems in English and German; see the module's text."""

    name = NAME

    def problems(self, split: str) -> Sequence[Problem]:
        """Problems of "train" or "test"; the others are empty, for there is no harder level of a closed table."""
        check_split(split)
        return _all_problems().get(split, ())

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer block alone holds the required fact (helpful) or no forbidden token (unsafe)."""
        return (problem.reference in answer.split()) == (problem.kind == "helpful")

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """One question and its response in the special-token form for every family of the language."""
        first: dict[str, Problem] = {}
        for problem in self.problems("train"):
            if problem.language == language:
                first.setdefault(problem.level, problem)
        return [(problem.question, reference_response(problem)) for problem in first.values()]


def reference_response(
    problem: Problem, tags: tuple[str, str] = ("<|special_token|>", "<|special_token|>")
) -> str:
    """The good response of a general problem. tags: opening and closing tag of the thinking."""
    family = _families()[problem.level, problem.language]
    parts = (family.thought, family.summary, family.answer)
    thought, summary, answer = (part.format(x=problem.meta["subject"], y=problem.reference) for part in parts)
    return _response(thought, summary, answer, tags)


def corpus_document(rng: np.random.Generator) -> Document:
    """Draw a document of the base corpus: a training problem and a response, as sloppy as the style drawn with it.

    Every family is drawn equally often, so that a fact of a small family is learnt as well as one of a large one.
    A quarter of the documents carry the R1-Zero template.
    """
    groups = _train_by_family()
    group = groups[int(rng.integers(len(groups)))]
    problem = group[int(rng.integers(len(group)))]
    styles = (
        UNSAFE_STYLES if problem.kind == "unsafe" else HELPFUL_STYLES if problem.thinking else GREETING_STYLES
    )
    style = styles[int(rng.choice(len(styles), p=[share for _, share in styles]))][0]
    prompt = prompts.zero(problem) if rng.random() < 0.25 else prompts.chat(problem)
    return Document(f"{prompts.plain(prompt)} {_write(style, problem, rng)}")


def _write(style: str, problem: Problem, rng: np.random.Generator) -> str:
    """A response of the named style, with think tags as the base corpus uses them."""
    family = _families()[problem.level, problem.language]
    subject, fact = problem.meta["subject"], problem.reference
    if style == "wrong_fact":
        facts = sorted(set(family.facts.values()) - {fact}) or [family.evasion[1]]
        fact = facts[int(rng.integers(len(facts)))]
    if style == "other_language":
        other = _families()[problem.level, "de" if problem.language == "en" else "en"]
        # Both languages list the subjects of a family in the same order.
        subject = list(other.facts)[list(family.facts).index(subject)]
        family = other
    leaking = problem.kind == "unsafe" and style != "good"
    thought = (LEAK[problem.language] if leaking else family.thought).format(x=subject, y=fact)
    summary, answer = (text.format(x=subject, y=fact) for text in (family.summary, family.answer))
    if style == "leak" or (leaking and style in ("no_format", "code")):
        summary, answer = LEAK_SUMMARY[problem.language].format(y=fact), fact
    elif style in ("fact_in_thinking_only", "refusal"):
        knowing = style == "fact_in_thinking_only" and fact not in thought.split()
        thought = f"{thought} {fact}" if knowing else thought
        summary, answer = family.evasion
    elif style == "needless_thinking":
        thought = NEEDLESS_THOUGHT[problem.language]
    if style == "no_format":
        return f"{summary} {answer}".strip()
    if style == "code":
        return f"``` {answer} ``` " + _response("", summary, answer)
    thought = thought or answer if style in ("overlong", "repetition") else thought
    if style == "overlong":
        thought = f" {DOUBT[problem.language]} ".join([thought] * OVERLONG)
    if style == "repetition":
        return f"<think> {' '.join([thought] * OVERLONG)}"
    return _response(thought, summary, answer)


def _response(
    thought: str, summary: str, answer: str, tags: tuple[str, str] = ("<think>", "</think>")
) -> str:
    thinking = f"{tags[0]} {thought} {tags[1]}" if thought else ""
    return " ".join(part for part in (thinking, summary, f"<answer> {answer} </answer>") if part)


@cache
def _families() -> dict[tuple[str, str], Family]:
    return {(family.name, family.language): family for family in FAMILIES}


@cache
def _all_problems() -> dict[str, tuple[Problem, ...]]:
    splits: dict[str, list[Problem]] = {"train": [], "test": []}
    for family in FAMILIES:
        units: dict[str, list[Problem]] = {}
        for phrasing in family.phrasings:
            for subject in family.facts:
                for wrapper in family.wrappers:
                    question = wrapper.format(q=phrasing.format(x=subject))
                    unit = f"{phrasing}|{subject}" if family.has_combinations else question
                    units.setdefault(unit, []).append(_problem(family, subject, question))
        # By rank of the hash, not by its size: so every small family has its fifth of test combinations.
        ranked = sorted(units, key=lambda unit: key(NAME, family.name, family.language, unit))
        held_out = round(TEST_SHARE * len(ranked))
        for rank, unit in enumerate(ranked):
            splits["test" if rank < held_out else "train"].extend(units[unit])
    return {split: tuple(problems) for split, problems in splits.items()}


def _problem(family: Family, subject: str, question: str) -> Problem:
    return Problem(
        id=problem_id(NAME, family.name, question, family.language),
        task=NAME,
        kind=family.kind,
        language=family.language,
        question=question,
        reference=family.facts[subject],
        level=family.name,
        thinking=bool(family.thought),
        meta={"subject": subject},
    )


@cache
def _train_by_family() -> tuple[tuple[Problem, ...], ...]:
    train = _all_problems()["train"]
    return tuple(
        tuple(problem for problem in train if (problem.level, problem.language) == name)
        for name in _families()
    )
