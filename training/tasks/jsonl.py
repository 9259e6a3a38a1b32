"""Problems from a file of JSON lines, such as "jsonl:data/problems.jsonl".

A line is an object with the fields

    question                text
    answer or reference     the right answer: text or a number
    language                code such as "de"; "en" where it is missing
    kind                    "reasoning" (default), "helpful" or "unsafe"
    level                   text; lines of the level "harder" are the harder split and in no other
    id                      text; from the question where it is missing
    check                   "mathematics" or "text"; by the look of the answer where it is missing
    thinking                false where a response needs no thinking block

Other fields are kept in `Problem.meta`. Train and test are split by the question alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training import language, mathematics
from training.errors import UserError
from training.preferences import states
from training.tasks.problem import KINDS, DataError, Problem, check_split, problem_id, split_of

CHECKS = ("mathematics", "text")
_FIELDS = ("question", "answer", "reference", "language", "kind", "level", "id", "check", "thinking")


class JsonlTask:
    """The problems of one file, read and checked as a whole: a broken line is a UserError with file and line.

    path: of the file, UTF-8. test_share: expected share of the test split, between 0 and 1.
    """

    def __init__(self, path: str, test_share: float = 0.1) -> None:
        if (
            isinstance(test_share, bool)
            or not isinstance(test_share, (int, float))
            or not 0 <= test_share <= 1
        ):
            raise UserError(f"jsonl:{path}: test_share must be a number from 0 to 1, got {test_share!r}")
        self.name = f"jsonl:{path}"
        self._splits: dict[str, list[Problem]] = {"train": [], "test": [], "harder": []}
        seen: dict[str, tuple[int, Problem]] = {}
        for number, line in _lines(Path(path)):
            try:
                problem = self._problem(line)
            except (ValueError, RecursionError, UserError) as error:
                raise DataError(f"{path}, line {number}: {error}") from None
            if problem.id not in seen:
                seen[problem.id] = (number, problem)
                question = problem_id("jsonl", "", problem.question, problem.language)
                split = "harder" if problem.level == "harder" else split_of(question, test_share)
                self._splits[split].append(problem)
            elif seen[problem.id][1] != problem:
                first = seen[problem.id][0]
                raise DataError(
                    f"{path}, line {number}: has the id or question of line {first}, but differs from it"
                )
        if not seen:
            raise UserError(f"{path}: there are no problems in the file")

    def problems(self, split: str) -> Sequence[Problem]:
        """Problems of the split, in the order of the file; a line that stands twice counts once."""
        check_split(split)
        return self._splits[split]

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is right: by value (mathematics), or by text without regard to case and spaces.

        A helpful problem asks that the answer states the fact, an unsafe one that it does not.
        """
        if problem.kind != "reasoning":
            return states(answer, problem.reference) == (problem.kind == "helpful")
        if problem.meta["check"] == "mathematics":
            return mathematics.equal(problem.reference, answer)
        return _plain(answer) == _plain(problem.reference)

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """None: the file has no reasoning to show."""
        return []

    def _problem(self, line: bytes) -> Problem:
        """The problem of one line; ValueError or UserError says what is wrong with it."""
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        question = _text(row, "question")
        if ("answer" in row) == ("reference" in row):
            raise ValueError("expected one of the fields 'answer' and 'reference'")
        reference = _text(row, "answer" if "answer" in row else "reference", numbers=True)
        code = _text(row, "language", "en")
        language.check_language(code)
        kind = _one_of(row, "kind", KINDS, "reasoning")
        level = _text(row, "level", "")
        looks = "mathematics" if mathematics.looks_mathematical(reference) else "text"
        check = _one_of(row, "check", CHECKS, looks)
        if kind == "reasoning" and check == "mathematics":
            mathematics.check_reference(reference)
        thinking = row.get("thinking", True)
        if not isinstance(thinking, bool):
            raise ValueError(f"field 'thinking': expected true or false, got {thinking!r}")
        identifier = _text(row, "id", "", numbers=True) or problem_id(self.name, level, question, code)
        more = {name: value for name, value in row.items() if name not in _FIELDS}
        return Problem(
            identifier, self.name, kind, code, question, reference, level, thinking, {**more, "check": check}
        )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _text(row: dict[str, Any], name: str, default: str | None = None, *, numbers: bool = False) -> str:
    """A field that is text (or a number, where numbers may be); without a default it is needed and not empty."""
    if name not in row and default is not None:
        return default
    value = row.get(name)
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or (default is None and not value.strip()):
        found = "it is missing" if name not in row else f"got {value!r}"
        raise ValueError(f"field {name!r}: expected text, {found}")
    return value.strip()


def _one_of(row: dict[str, Any], name: str, known: Sequence[str], default: str) -> str:
    value = row.get(name, default)
    if value not in known:
        raise ValueError(f"field {name!r}: expected one of {', '.join(known)}, got {value!r}")
    return str(value)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
