"""Column-wise addition in two languages: the reasoning task of the small recipes.

A worked example adds digit by digit from the right and carries: for 57 plus 68 it thinks
`7 plus 8 makes 15 carry 1 . 5 plus 6 plus 1 makes 12 .` and answers 125.
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

_QUESTION = {"en": "what is {a} plus {b} ?", "de": "wieviel ist {a} und {b} ?"}
_STEP_WORDS = {
    "en": {"plus": "plus", "makes": "makes", "carry": "carry", "check": "check"},
    "de": {"plus": "und", "makes": "gibt", "carry": "merke", "check": "prüfe"},
}
_DOUBT = {"en": "wait let me try again .", "de": "warte ich rechne noch einmal ."}

WORDS: dict[str, tuple[str, ...]] = {
    language: tuple(
        sorted(
            word
            for text in (
                LEAD_IN[language],
                _QUESTION[language],
                _DOUBT[language],
                *_STEP_WORDS[language].values(),
            )
            for word in text.split()
            if word.isalpha()
        )
    )
    for language in LANGUAGES
}

Word = Callable[[str], str]  # a step word's name -> the word to write
Slip = Callable[[int], int]  # the sum of a column -> the sum to write


class ArithmeticTask:
    """Sums of two numbers of `digits` digits; the harder level has one digit more and is in no training text."""

    name = NAME

    def __init__(self, digits: int = 2) -> None:
        if digits not in (1, 2, 3):
            raise UserError(f"arithmetic: digits must be 1, 2 or 3, got {digits!r}")
        self.digits = digits

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of the split; a pair of numbers is in one split in both orders and both languages; none is hardest."""
        check_split(split)
        if split == "hardest":
            return ()
        if split == "harder":
            return _harder_problems(self.digits + 1)
        return _split_problems(self.digits)[split]

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer block is the sum and nothing else."""
        return answer.strip() == problem.reference

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """Four training questions of the language with tidy responses in the special-token form."""
        return list(_worked_examples(self.digits, language))


@cache
def _worked_examples(digits: int, language: str) -> tuple[tuple[str, str], ...]:
    problems = [p for p in _split_problems(digits)["train"] if p.language == language]
    step = len(problems) // 4
    return tuple(
        (p.question, response(*tidy(p), form="special", language=language))
        for p in problems[step - 1 :: step]
    )


def make_problem(a: int, b: int, language: str) -> Problem:
    """The problem a + b."""
    level = f"{max(len(str(a)), len(str(b)))} digits"
    question = _QUESTION[language].format(a=a, b=b)
    return Problem(
        id=problem_id(NAME, level, question, language),
        task=NAME,
        kind="reasoning",
        language=language,
        question=question,
        reference=str(a + b),
        level=level,
        meta={"a": a, "b": b},
    )


@cache
def _split_problems(digits: int) -> dict[str, tuple[Problem, ...]]:
    splits: dict[str, list[Problem]] = {"train": [], "test": []}
    low, high = (1 if digits == 1 else 10 ** (digits - 1)), 10**digits
    for a in range(low, high):
        for b in range(low, high):
            split = split_of(f"{NAME} {min(a, b)} {max(a, b)}", test_share=0.1 if digits > 1 else 0.2)
            splits[split].extend(make_problem(a, b, language) for language in LANGUAGES)
    return {name: tuple(problems) for name, problems in splits.items()}


@cache
def _harder_problems(digits: int, count: int = 2048) -> tuple[Problem, ...]:
    rng = np.random.default_rng(digits)
    pairs = rng.integers(10 ** (digits - 1), 10**digits, size=(count, 2))
    return tuple(
        make_problem(int(a), int(b), LANGUAGES[i % 2]) for i, (a, b) in enumerate(np.unique(pairs, axis=0))
    )


def think(problem: Problem, word: Word, slip: Slip = lambda total: total) -> tuple[str, str]:
    """The column-wise steps and the answer that follows from them, right or wrong as `slip` makes the columns."""
    first, second = (str(problem.meta[name])[::-1] for name in ("a", "b"))
    steps, answer, carry = [], "", 0
    for position in range(max(len(first), len(second))):
        terms = [number[position] for number in (first, second) if position < len(number)]
        terms += [str(carry)] if carry else []
        total = slip(sum(map(int, terms)))
        last = position == max(len(first), len(second)) - 1
        carry = 0 if last else total // 10
        carried = f" {word('carry')} {carry}" if carry else ""
        # Every word is asked for on its own, so that a mixing voice may change language inside a step.
        summed = terms[0] + "".join(f" {word('plus')} {term}" for term in terms[1:])
        steps.append(f"{summed} {word('makes')} {total}{carried} .")
        answer = str(total if last else total % 10) + answer
    return " ".join(steps), answer


def tidy(problem: Problem) -> tuple[str, str]:
    """The right steps in the language of the question, and the answer."""
    return think(problem, _STEP_WORDS[problem.language].__getitem__)


def response(thinking: str, answer: str, *, form: str, language: str) -> str:
    """A response in the form "think" (R1-Zero) or "special" (cold start and after, with a summary)."""
    if form == "think":
        return f"<think> {thinking} </think> <answer> {answer} </answer>"
    return f"<|special_token|> {thinking} <|special_token|> {LEAD_IN[language]} <answer> {answer} </answer>"


def corpus_document(rng: np.random.Generator, kind: str, digits: int = 2) -> tuple[Problem, str]:
    """A training problem and a response of the named kind, as the pretraining corpus holds them.

    kind: "tidy" (right steps, one language), "mixed" (right steps, words of both languages), "sloppy" (every column
    wrong with probability one half), "formless" (right steps, tags missing or misplaced), "bare" (a guess near
    the answer), "code" (a code block instead of steps), "overlong" (the steps again and again), "repetition" (one
    step without end), "reflect" (the steps and their check, of any quality), "few_shot" (special-token form, of
    any quality).
    """
    train = _split_problems(digits)["train"]
    problem = train[int(rng.integers(len(train)))]
    if kind not in _WRITERS:
        raise UserError(f"base.corpus: unknown kind {kind!r}; known are {', '.join(_WRITERS)}")
    return problem, _WRITERS[kind](problem, rng)


def _mixing_word(rng: np.random.Generator) -> Word:
    return lambda name: _STEP_WORDS[LANGUAGES[int(rng.integers(2))]][name]


def _slipping(rng: np.random.Generator) -> Slip:
    return lambda total: (
        total if rng.random() < 0.5 else max(0, total + int(rng.choice([-3, -2, -1, 1, 2, 3])))
    )


def _of_any_quality(problem: Problem, rng: np.random.Generator) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.4:
        return tidy(problem)
    if draw < 0.7:
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


def _sloppy(problem: Problem, rng: np.random.Generator) -> str:
    thinking, answer = think(problem, _mixing_word(rng), _slipping(rng))
    return _think_form(thinking, answer) if rng.random() < 0.5 else _spoil_form(thinking, answer, rng)


def _formless(problem: Problem, rng: np.random.Generator) -> str:
    return _spoil_form(*think(problem, _mixing_word(rng)), rng)


def _guess(problem: Problem, rng: np.random.Generator) -> int:
    return max(0, int(problem.reference) + round(rng.normal(0, 5)))


def _bare(problem: Problem, rng: np.random.Generator) -> str:
    guess = _guess(problem, rng)
    variants = (f"{guess} .", f"<answer> {guess} </answer>", f"<think> </think> <answer> {guess} </answer>")
    return variants[int(rng.integers(len(variants)))]


def _code(problem: Problem, rng: np.random.Generator) -> str:
    guess = _guess(problem, rng)
    block = f"``` {problem.meta['a']} + {problem.meta['b']} = {guess} ```"
    return _think_form(block, str(guess)) if rng.random() < 0.5 else f"{block} <answer> {guess} </answer>"


def _overlong(problem: Problem, rng: np.random.Generator) -> str:
    thinking, answer = think(problem, _mixing_word(rng))
    doubts = [f"{_DOUBT[problem.language]} {thinking}" for _ in range(int(rng.integers(2, 4)))]
    return _think_form(" ".join([thinking, *doubts]), answer)


def _repetition(problem: Problem, rng: np.random.Generator) -> str:
    step = think(problem, _mixing_word(rng))[0].split(" . ")[0]
    return "<think> " + " . ".join([step] * int(rng.integers(5, 9))) + " ."


def _few_shot(problem: Problem, rng: np.random.Generator) -> str:
    return response(*_of_any_quality(problem, rng), form="special", language=problem.language)


def _reflect(problem: Problem, rng: np.random.Generator) -> str:
    thinking, answer = _of_any_quality(problem, rng)
    turned = make_problem(problem.meta["b"], problem.meta["a"], problem.language)
    check = _STEP_WORDS[problem.language]["check"]
    summary = f"{LEAD_IN[problem.language]} <answer> {answer} </answer>"
    return f"<think> {thinking} {check} : {tidy(turned)[0]} </think> {summary}"


def _tidy(problem: Problem, rng: np.random.Generator) -> str:
    return _think_form(*tidy(problem))


_WRITERS: dict[str, Callable[[Problem, np.random.Generator], str]] = {
    "tidy": _tidy,
    "mixed": _mixed,
    "sloppy": _sloppy,
    "formless": _formless,
    "bare": _bare,
    "code": _code,
    "overlong": _overlong,
    "repetition": _repetition,
    "few_shot": _few_shot,
    "reflect": _reflect,
}

DOCUMENT_KINDS = tuple(_WRITERS)
