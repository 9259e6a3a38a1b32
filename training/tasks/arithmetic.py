"""Counting up in equal steps until a limit is passed, in two languages: the reasoning task of the small recipes.

A worked example says of every number whether it is under the limit, and goes on while it is: from 12 by 7 over 30 it thinks
`12 under 30 plus 7 makes 19 under 30 plus 7 makes 26 under 30 plus 7 makes 33 over 30 .` and answers 33. So a problem that
is further from its limit asks for more steps, and each of them needs no more than the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from training.errors import UserError
from training.prompts import LEAD_IN
from training.tasks.problem import Problem, check_split, problem_id, split_of

NAME = "arithmetic"
LANGUAGES = ("en", "de")
STEPS_BY = range(2, 10)
FIRST = 10  # the smallest number to count from: all have two digits

_QUESTION = {
    "en": "from {start} by {by} what is first over {limit} ?",
    "de": "von {start} um {by} was ist zuerst über {limit} ?",
}
_STEP_WORDS = {
    "en": {"under": "under", "over": "over", "plus": "plus", "makes": "makes", "check": "check"},
    "de": {"under": "unter", "over": "über", "plus": "und", "makes": "gibt", "check": "prüfe"},
}
_DOUBT = {"en": "wait let me try again .", "de": "warte ich rechne noch einmal ."}
_SAID = {language: {**_STEP_WORDS[language], "doubt": _DOUBT[language]} for language in LANGUAGES}

WORDS: dict[str, tuple[str, ...]] = {
    language: tuple(
        sorted(
            {
                word
                for text in (
                    LEAD_IN[language],
                    _QUESTION[language],
                    _DOUBT[language],
                    *_STEP_WORDS[language].values(),
                )
                for word in text.split()
                if word.isalpha()
            }
        )
    )
    for language in LANGUAGES
}

Word = Callable[[str], str]  # a step word's name -> the word to write
Slip = Callable[[int], int]  # the sum of a step -> the sum to write


class ArithmeticTask:
    """Problems with limits up to `largest`, by the number of steps that they ask for:

    1 to steps            the base corpus shows training problems; "test" is what is held out of them
    steps + 1, steps + 2  no text of the corpus has so many steps. Training problems are there for reinforcement learning;
                          "harder" is what is held out
    steps + 3, steps + 4  no stage trains on any; "hardest" is what is held out
    """

    name = NAME

    def __init__(self, steps: int = 4, largest: int = 87) -> None:
        for name, value, low, high in (("steps", steps, 1, 6), ("largest", largest, 20, 87)):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"arithmetic: {name} must be an integer from {low} to {high}, got {value!r}")
        self.steps, self.largest = steps, largest

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of the split. Those that end alike (same step, limit and answer) are in training or held out at every
        level and in both languages, so that no held-out problem is the rest of one that was trained on."""
        check_split(split)
        held_out, levels = {
            "train": (False, range(1, self.steps + 3)),
            "test": (True, range(1, self.steps + 1)),
            "harder": (True, range(self.steps + 1, self.steps + 3)),
            "hardest": (True, range(self.steps + 3, self.steps + 5)),
        }[split]
        return tuple(p for level in levels for p in _of_level(self.largest, level, held_out))

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer block is the number and nothing else."""
        return answer.strip() == problem.reference

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """Four training questions of one step in the language, with tidy responses in the special-token form."""
        return list(_worked_examples(self.largest, language))

    def dictionary(self, language: str) -> dict[str, str]:
        """What stands in `language` for the words and sentences of steps in the other languages."""
        return {
            other[name]: _SAID[language][name]
            for code, other in _SAID.items()
            for name in other
            if code != language and language in _SAID
        }


def make_problem(start: int, by: int, limit: int, language: str) -> Problem:
    """The problem of the first number over `limit` on the way from `start` in steps of `by`."""
    steps = (limit - start) // by + 1
    level = f"{steps} step" if steps == 1 else f"{steps} steps"
    question = _QUESTION[language].format(start=start, by=by, limit=limit)
    return Problem(
        id=problem_id(NAME, level, question, language),
        task=NAME,
        kind="reasoning",
        language=language,
        question=question,
        reference=str(start + steps * by),
        level=level,
        meta={"start": start, "by": by, "limit": limit},
    )


@cache
def _of_level(largest: int, steps: int, held_out: bool) -> tuple[Problem, ...]:
    """The problems of so many steps. No number on the way is the limit itself, which would be neither under nor over it."""
    problems = []
    for limit in range(FIRST + 1, largest + 1):
        for by in STEPS_BY:
            for answer in range(limit + 1, limit + by):
                start = answer - steps * by
                split = split_of(f"{NAME} {by} {limit} {answer}", test_share=0.15)
                if start >= FIRST and (split == "test") == held_out:
                    problems += [make_problem(start, by, limit, language) for language in LANGUAGES]
    return tuple(problems)


@cache
def _worked_examples(largest: int, language: str) -> tuple[tuple[str, str], ...]:
    problems = [p for p in _of_level(largest, 1, held_out=False) if p.language == language]
    step = len(problems) // 4
    return tuple(
        (p.question, response(*tidy(p), form="special", language=language))
        for p in problems[step - 1 :: step][:4]
    )


def think(problem: Problem, word: Word, slip: Slip = lambda total: total) -> tuple[str, str]:
    """The steps and the answer that follows from them, right or wrong as `slip` makes the sums."""
    number, by, limit = (problem.meta[name] for name in ("start", "by", "limit"))
    text = str(number)
    while number <= limit:
        number = slip(number + by)
        # Every word is asked for on its own, so that a mixing voice may change language inside a step.
        text += f" {word('under')} {limit} {word('plus')} {by} {word('makes')} {number}"
    return f"{text} {word('over')} {limit} .", str(number)


def tidy(problem: Problem) -> tuple[str, str]:
    """The right steps in the language of the question, and the answer."""
    return think(problem, _STEP_WORDS[problem.language].__getitem__)


def response(thinking: str, answer: str, *, form: str, language: str) -> str:
    """A response in the form "think" (R1-Zero) or "special" (cold start and after, with a summary)."""
    if form == "think":
        return f"<think> {thinking} </think> <answer> {answer} </answer>"
    return f"<|special_token|> {thinking} <|special_token|> {LEAD_IN[language]} <answer> {answer} </answer>"


def corpus_document(
    rng: np.random.Generator, kind: str, steps: int = 4, largest: int = 87
) -> tuple[Problem, str]:
    """A training problem and a response of the named kind, as the pretraining corpus holds them. All numbers of steps that the
    corpus shows are as frequent.

    kind: "tidy" (right steps, one language), "mixed" (right steps, words of both languages), "hasty" (no steps, and most
    often the limit itself for an answer), "sloppy" (every sum too large with probability one half), "formless" (right
    steps, tags missing or misplaced), "code" (a code block instead of steps), "overlong" (the steps
    again and again), "repetition" (one step without end), "reflect" (the steps and a check of the last one, of any
    quality), "few_shot" (special-token form, of any quality), "series" (right steps alone, words of both languages: it is
    no response, and no question stands before it).
    """
    if kind not in _WRITERS:
        raise UserError(f"base.corpus: unknown kind {kind!r}; known are {', '.join(_WRITERS)}")
    problem = _draw(rng, largest, int(rng.integers(1, steps + 1)))
    return problem, _WRITERS[kind](problem, rng)


def _draw(rng: np.random.Generator, largest: int, steps: int) -> Problem:
    problems = _of_level(largest, steps, held_out=False)
    return problems[int(rng.integers(len(problems)))]


def _mixing_word(rng: np.random.Generator) -> Word:
    return lambda name: _STEP_WORDS[LANGUAGES[int(rng.integers(2))]][name]


def _slipping(rng: np.random.Generator) -> Slip:
    # Never too small: no chain of the corpus is longer than its problem asks for.
    return lambda total: total if rng.random() < 0.5 else total + int(rng.integers(1, 4))


def _of_any_quality(problem: Problem, rng: np.random.Generator) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.4:
        return tidy(problem)
    if draw < 0.8:
        return think(problem, _mixing_word(rng))
    return think(problem, _STEP_WORDS[problem.language].__getitem__, _slipping(rng))


def _think_form(thinking: str, answer: str) -> str:
    return response(thinking, answer, form="think", language="")


def _spoil_form(thinking: str, answer: str, rng: np.random.Generator) -> str:
    variants = (
        f"{thinking} {answer} .",
        f"{thinking} <answer> {answer} </answer>",
        f"<think> {thinking} <answer> {answer} </answer>",
        f"<think> {thinking} </think> {answer} .",
        f"<think> {thinking} </think> <answer> {answer}",
        f"<think> {thinking} <answer> {answer} </answer> </think>",
    )
    return variants[int(rng.integers(len(variants)))]


def _mixed(problem: Problem, rng: np.random.Generator) -> str:
    return _think_form(*think(problem, _mixing_word(rng)))


def _guess(problem: Problem, rng: np.random.Generator) -> int:
    off = 0 if rng.random() < 0.6 else round(rng.normal(0, 5))
    return min(99, max(FIRST, problem.meta["limit"] + off))


def _hasty(problem: Problem, rng: np.random.Generator) -> str:
    guess = str(_guess(problem, rng))
    thinking = f"{_STEP_WORDS[problem.language]['over']} {problem.meta['limit']} ."
    return _think_form(thinking, guess) if rng.random() < 0.5 else _spoil_form(thinking, guess, rng)


def _sloppy(problem: Problem, rng: np.random.Generator) -> str:
    thinking, answer = think(problem, _mixing_word(rng), _slipping(rng))
    return _think_form(thinking, answer) if rng.random() < 0.5 else _spoil_form(thinking, answer, rng)


def _formless(problem: Problem, rng: np.random.Generator) -> str:
    return _spoil_form(*think(problem, _mixing_word(rng)), rng)


def _code(problem: Problem, rng: np.random.Generator) -> str:
    guess = _guess(problem, rng)
    block = f"``` {problem.meta['start']} + {problem.meta['by']} > {problem.meta['limit']} ```"
    return _think_form(block, str(guess)) if rng.random() < 0.5 else f"{block} <answer> {guess} </answer>"


def _overlong(problem: Problem, rng: np.random.Generator) -> str:
    thinking, answer = think(problem, _mixing_word(rng))
    doubts = [f"{_DOUBT[problem.language]} {thinking}" for _ in range(int(rng.integers(1, 3)))]
    return _think_form(" ".join([thinking, *doubts]), answer)


def _repetition(problem: Problem, rng: np.random.Generator) -> str:
    word, meta = _mixing_word(rng), problem.meta
    step = f"{word('under')} {meta['limit']} {word('plus')} {meta['by']} {word('makes')} {meta['start']}"
    return f"<think> {meta['start']} " + " ".join([step] * int(rng.integers(5, 9)))


def _few_shot(problem: Problem, rng: np.random.Generator) -> str:
    return response(*_of_any_quality(problem, rng), form="special", language=problem.language)


def _reflect(problem: Problem, rng: np.random.Generator) -> str:
    thinking, answer = _of_any_quality(problem, rng)
    words, meta = _STEP_WORDS[problem.language], problem.meta
    last = int(problem.reference) - meta["by"]
    check = f"{words['check']} : {tidy(make_problem(last, meta['by'], meta['limit'], problem.language))[0]}"
    return f"<think> {thinking} {check} </think> {LEAD_IN[problem.language]} <answer> {answer} </answer>"


def _series(problem: Problem, rng: np.random.Generator) -> str:
    return think(problem, _mixing_word(rng))[0]


def _tidy(problem: Problem, rng: np.random.Generator) -> str:
    return _think_form(*tidy(problem))


_WRITERS: dict[str, Callable[[Problem, np.random.Generator], str]] = {
    "tidy": _tidy,
    "mixed": _mixed,
    "hasty": _hasty,
    "sloppy": _sloppy,
    "formless": _formless,
    "code": _code,
    "overlong": _overlong,
    "repetition": _repetition,
    "few_shot": _few_shot,
    "reflect": _reflect,
    "series": _series,
}

DOCUMENT_KINDS = tuple(_WRITERS)
