"""Countdown: make a target from given numbers, every number exactly once. Worked examples try, doubt and try again.

The answer is an expression, read by a small parser of its own; nothing is ever evaluated as a programme.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import permutations, product

from training.errors import UserError
from training.seeding import numpy_rng
from training.tasks.problem import Problem, check_split, problem_id, split_of

NAME = "countdown"
LANGUAGES = ("en", "de")

_QUESTION = {
    "en": "use each of the numbers {numbers} once to make {target} .",
    "de": "mache {target} aus den zahlen {numbers} , jede einmal .",
}
_AND = {"en": "and", "de": "und"}
_MAKES = {"en": "makes", "de": "gibt"}
_WRONG = {"en": "that is not right", "de": "das ist nicht richtig"}
_RIGHT = {"en": "that is right", "de": "das ist richtig"}
_SUMMARY = {"en": "the answer is", "de": "die antwort ist"}

WORDS: dict[str, tuple[str, ...]] = {
    language: tuple(
        sorted(
            {
                word
                for texts in (_QUESTION, _AND, _MAKES, _WRONG, _RIGHT, _SUMMARY)
                for word in texts[language].split()
                if word.isalpha()
            }
        )
    )
    for language in LANGUAGES
}

_OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_SPELLINGS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-"})
_TOKEN = re.compile(r"\s*(\d{1,9}|[-+*/()])")
_LONGEST = 64  # tokens of an expression; it bounds the depth of the parser too


class CountdownTask:
    """Countdown problems in English and German; the harder level has one number more.

    numbers: how many numbers, 2 to 5. largest: the largest number, 3 to 99. operators: the operators that make the
    targets, some of "+-*/" (an answer may use all four). size: problems a language in train and test together, at
    most. seed: of the problems.
    """

    name = NAME

    def __init__(
        self, numbers: int = 3, largest: int = 9, operators: str = "+-", size: int = 2000, seed: int = 0
    ) -> None:
        for name, value, low, high in (
            ("numbers", numbers, 2, 5),
            ("largest", largest, 3, 99),
            ("size", size, 1, 10**6),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"countdown: {name} must be an integer from {low} to {high}, got {value!r}")
        if not operators or set(operators) - set(_OPERATORS):
            raise UserError(f"countdown: operators must be some of '+-*/', got {operators!r}")
        self.numbers, self.largest, self.operators, self.size, self.seed = (
            numbers,
            largest,
            operators,
            size,
            seed,
        )

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of the split. The same numbers and target are in one split in every order and language; none is hardest."""
        check_split(split)
        if split == "hardest":
            return []
        count = self.numbers + (split == "harder")
        made = _make(count, self.largest, self.operators, self.size, self.seed)
        return [problem for problem, part in made if split in ("harder", part)]

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is an expression of the target that uses every number exactly once.

        Text that is no expression is wrong, and so is a division by zero.
        """
        try:
            value, used = evaluate(answer)
        except ValueError:
            return False
        return value == problem.meta["target"] and sorted(used) == sorted(problem.meta["numbers"])

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """Four training questions with a search in the special-token form: two wrong tries, then the solution."""
        if language not in LANGUAGES:
            return []
        chosen = [problem for problem in self.problems("train") if problem.language == language][:4]
        return [(problem.question, _search(problem)) for problem in chosen]


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Value of an expression of integers, + - * / and parentheses, and the integers in it, in order.

    × · ÷ and the long minus signs are understood. There is no sign before a number, so that a number cannot be
    used as its negative. ValueError for anything else, for a division by zero and for more than 64 tokens.
    """
    tokens = _tokens(text.translate(_SPELLINGS))
    used: list[int] = []
    value, end = _sum(tokens, 0, used)
    if end != len(tokens) - 1:
        raise ValueError(f"unexpected {tokens[end]!r}")
    return value, used


def _tokens(text: str) -> list[str]:
    """The tokens of the text, and an empty one at the end."""
    tokens: list[str] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) == _LONGEST:
            raise ValueError("not an expression")
        tokens.append(match[1])
        position = match.end()
    return [*tokens, ""]


# One function a level of precedence; each takes the position of its first token and returns the one after it.


def _sum(tokens: list[str], position: int, used: list[int]) -> tuple[Fraction, int]:
    value, position = _product(tokens, position, used)
    while tokens[position] in ("+", "-"):
        sign = tokens[position]
        term, position = _product(tokens, position + 1, used)
        value = _OPERATORS[sign](value, term)
    return value, position


def _product(tokens: list[str], position: int, used: list[int]) -> tuple[Fraction, int]:
    value, position = _atom(tokens, position, used)
    while tokens[position] in ("*", "/"):
        sign = tokens[position]
        factor, position = _atom(tokens, position + 1, used)
        if sign == "/" and factor == 0:
            raise ValueError("division by zero")
        value = _OPERATORS[sign](value, factor)
    return value, position


def _atom(tokens: list[str], position: int, used: list[int]) -> tuple[Fraction, int]:
    token = tokens[position]
    if token == "(":
        value, position = _sum(tokens, position + 1, used)
        if tokens[position] != ")":
            raise ValueError("a parenthesis is not closed")
        return value, position + 1
    if not token.isdecimal():
        raise ValueError(f"expected a number, got {token!r}")
    used.append(int(token))
    return Fraction(int(token)), position + 1


def _write(numbers: Sequence[int], signs: Sequence[str]) -> str:
    """The numbers joined from left to right, with parentheses where a product follows a sum."""
    text, is_sum = str(numbers[0]), False
    for sign, number in zip(signs, numbers[1:], strict=True):
        text = f"( {text} )" if is_sum and sign in "*/" else text
        text, is_sum = f"{text} {sign} {number}", sign in "+-"
    return text


@cache
def _make(count: int, largest: int, operators: str, size: int, seed: int) -> list[tuple[Problem, str]]:
    """Solvable problems, each with the split of its numbers and target; targets are 1 to 100."""
    made: list[tuple[Problem, str]] = []
    tried, seen = set(), set()
    rng = numpy_rng(NAME, seed, count, largest, operators)
    for _ in range(20 * size):  # small settings have fewer different problems than `size`
        numbers = [int(number) for number in rng.integers(1, largest + 1, count)]
        signs = [operators[int(index)] for index in rng.integers(0, len(operators), count - 1)]
        solution = _write(numbers, signs)
        if solution in tried:
            continue
        tried.add(solution)
        target = _value(solution)
        key = f"{NAME} {sorted(numbers)} {target}"
        if target is None or not 1 <= target <= 100 or target.denominator != 1 or key in seen:
            continue
        seen.add(key)
        shown = [numbers[int(index)] for index in rng.permutation(count)]
        made += [(_problem(shown, int(target), solution, language), split_of(key)) for language in LANGUAGES]
        if len(seen) == size:
            break
    return made


def _value(text: str) -> Fraction | None:
    try:
        return evaluate(text)[0]
    except ValueError:
        return None


def _problem(numbers: list[int], target: int, solution: str, language: str) -> Problem:
    listed = " , ".join(map(str, numbers[:-1])) + f" {_AND[language]} {numbers[-1]}"
    question = _QUESTION[language].format(numbers=listed, target=target)
    level = f"{len(numbers)} numbers"
    return Problem(
        id=problem_id(NAME, level, question, language),
        task=NAME,
        kind="reasoning",
        language=language,
        question=question,
        reference=solution,
        level=level,
        meta={"numbers": tuple(numbers), "target": target},
    )


def _tries(numbers: Sequence[int]) -> Iterator[str]:
    for order in permutations(numbers):
        for signs in product("+-", repeat=len(numbers) - 1):
            yield _write(order, signs)


def _search(problem: Problem) -> str:
    """A response that tries two wrong expressions before the solution."""
    language = problem.language
    wrong = (text for text in _tries(problem.meta["numbers"]) if _value(text) != problem.meta["target"])
    steps = []
    for text, _ in zip(wrong, range(2), strict=False):
        value = _value(text)
        shown = f"- {-value}" if value is not None and value < 0 else f"{value}"
        steps.append(f"{text} {_MAKES[language]} {shown} . {_WRONG[language]} .")
    steps.append(f"{problem.reference} {_MAKES[language]} {problem.meta['target']} . {_RIGHT[language]} .")
    summary = f"{_SUMMARY[language]} <answer> {problem.reference} </answer>"
    return f"<|special_token|> {' '.join(steps)} <|special_token|> {summary}"
