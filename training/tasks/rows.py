"""Problems from rows of any source: a file of JSON lines or Parquet, a data set of Hugging Face's library.

A row is an object with the fields

    question                text
    messages                instead of a question: [{"role": "user", "content": ...}, ...], the user's turn last
    answer or reference     the right answer: text or a number; worked solutions that end with "#### 72" (GSM8K), with
                            "\\boxed{5}" (MATH) or say "the answer is 5" are read too
    choices                 texts, or {"text": [...], "label": [...]}: they are listed below the question, and the answer is
                            the letter, the index from 0 (a number) or the text of one of them
    language                BCP-47 tag such as "de" or "zh-CN"; "en" where it is missing
    kind                    "reasoning" (default), "helpful" or "unsafe"
    level                   text or a number; lines of the level "harder" or "hardest" are the split of that name and in no other
    id                      text or a number; from the content of the line where it is missing
    check                   "mathematics", "text" or "choice"; by the look of the answer where it is missing
    thinking                false where a response needs no thinking block

Other fields are kept in `Problem.meta`. Train and test are split by the question alone, where the source has no splits of its own.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from training import answers, language
from training.config import unknown
from training.errors import UserError
from training.preferences import states
from training.tasks.problem import KINDS, SPLITS, DataError, Problem, check_split, problem_id, split_of

FIELDS = (
    "question",
    "messages",
    "answer",
    "reference",
    "choices",
    "language",
    "kind",
    "level",
    "id",
    "check",
    "thinking",
)
ROLES = ("system", "user", "assistant")


class Row(NamedTuple):
    """One row: where it stands ("line 3"), how it is read (a ValueError says what is wrong with it), and the split that its
    source puts it into, "train" or "test"; None: as its question falls."""

    place: str
    read: Callable[[], Mapping[str, Any]]
    split: str | None = None


class RowsTask:
    """The problems of one source, read and checked as a whole: a broken row is a UserError with source and place.

    name: of the task, "jsonl:problems.jsonl". source: as messages name it. test_share: expected share of the test split, between
    0 and 1. columns: field -> its name in the source, where that is another one, as in {"question": "problem", "answer":
    "solution"}; a dot leads into an object: {"answer": "reward_model.ground_truth"}.
    """

    def __init__(
        self,
        name: str,
        source: str,
        rows: Iterable[Row],
        test_share: float = 0.1,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        if (
            isinstance(test_share, bool)
            or not isinstance(test_share, (int, float))
            or not 0 <= test_share <= 1
        ):
            raise UserError(f"{name}: test_share must be a number from 0 to 1, got {test_share!r}")
        for field in columns or {}:
            if field not in FIELDS:
                raise unknown(f"field in the columns of {name}", field, FIELDS)
        self._columns = dict(columns or {})
        self.name = name
        self._splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        absent = dict(self._columns)
        ids: dict[str, tuple[str, Problem]] = {}
        questions: dict[Any, tuple[str, Problem, str]] = {}
        for row in rows:
            found: Mapping[str, Any] = {}
            try:
                found = row.read()
                problem = self._problem(found)
                for field in absent.keys() & self._renamed(found).keys():
                    del absent[field]
                if row.split:  # ids of a source's splits may be the same numbers
                    problem = replace(problem, id=f"{row.split}-{problem.id}")
                asked = (problem.before, problem.question, problem.language, problem.level)
                first, known = ids.setdefault(problem.id, (row.place, problem))
                if known != problem:
                    raise ValueError(f"has the id of {first}, but differs from it")
                if first != row.place:
                    continue  # the same row again
                question = problem_id("jsonl", "", problem.question, problem.language)
                own = problem.level if problem.level in SPLITS[2:] else row.split
                split = own or split_of(question, test_share)
                # a question that stands in both splits of a source is in the one that is read first
                first, known, split = questions.setdefault(asked, (row.place, problem, split))
                if (known.reference, known.kind) != (problem.reference, problem.kind):
                    raise ValueError(f"has the question of {first}, but differs from it in answer or kind")
                if row.split and first != row.place:
                    continue
            except (ValueError, RecursionError, UserError) as error:
                raise DataError(f"{source}, {row.place}: {error}{self._columns_hint(found)}") from None
            self._splits[split].append(problem)
        if not ids:
            raise UserError(f"{source}: there are no problems in it")
        for field, column in absent.items():
            raise UserError(f"{source}: no row has {column!r}, which columns names for {field!r}")

    def problems(self, split: str) -> Sequence[Problem]:
        """Problems of the split, in the order of the source; a row that stands twice counts once."""
        check_split(split)
        return self._splits[split]

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is right, by value, by text or by the letter of a choice (`answers.right`).

        A helpful problem asks that the answer states the fact, an unsafe one that it does not.
        """
        if problem.kind != "reasoning":
            return states(answer, problem.reference) == (problem.kind == "helpful")
        choices = problem.meta.get("choices")
        return answers.right(problem.meta["check"], problem.reference, answer, choices, problem.language)

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """None: a source has no reasoning to show."""
        return []

    def _columns_hint(self, row: Mapping[str, Any]) -> str:
        """How to name the fields of a source that calls its question or its answer otherwise; "" where it does not."""
        found = set(self._renamed(row))
        if not row or (found & {"question", "messages"} and found & {"answer", "reference"}):
            return ""
        return (
            f"; the row has {', '.join(row)}: say which they are with "
            f"'task_options={{\"{self.name}\": {{columns: {{question: NAME, answer: NAME}}}}}}'"
        )

    def _renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its fields under the names of FIELDS; a field with a column of its own is read from there alone."""
        theirs = {*self._columns, *self._columns.values()}
        renamed = {name: value for name, value in row.items() if name not in theirs}
        for field, name in self._columns.items():
            value: Any = row
            for part in [name] if name in row else name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                renamed[field] = value
        return renamed

    def _problem(self, found: Mapping[str, Any]) -> Problem:
        """The problem of one row; ValueError or UserError says what is wrong with it."""
        row = self._renamed(found)
        before, question = _asked(row)
        if ("answer" in row) == ("reference" in row):
            raise ValueError("expected one of the fields 'answer' and 'reference'")
        name = "answer" if "answer" in row else "reference"
        kind = _one_of(row, "kind", KINDS, "reasoning")
        choices = answers.labelled(row["choices"]) if "choices" in row else {}
        if choices:
            question = _with_choices(question, choices)
            reference = answers.chosen(row[name], choices)
        else:
            reference = text_of(row, name, numbers=True)
            reference = answers.short_answer(reference) if kind == "reasoning" else reference
        spoken = language.tag(text_of(row, "language", "en"))
        check = _one_of(row, "check", answers.CHECKS, answers.check_of(reference, choices, spoken))
        if kind == "reasoning":
            answers.check_reference(check, reference, choices, spoken)
        thinking = row.get("thinking", True)
        if not isinstance(thinking, bool):
            raise ValueError(f"field 'thinking': expected true or false, got {thinking!r}")
        more = {name: value for name, value in row.items() if name not in FIELDS}
        return Problem(
            id=text_of(row, "id", "", numbers=True) or _content_id(row),
            task=self.name,
            kind=kind,
            language=spoken,
            question=question,
            reference=reference,
            level=text_of(row, "level", "", numbers=True),
            thinking=thinking,
            meta={**more, "check": check, **({"choices": choices} if choices else {})},
            before=before,
        )


def text_of(row: Mapping[str, Any], name: str, default: str | None = None, *, numbers: bool = False) -> str:
    """A field that is text (or a number, where numbers may be); without a default it is needed and not empty."""
    value = row.get(name)
    if value is None and default is not None:
        return default
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or (default is None and not value.strip()):
        found = "it is missing" if name not in row else f"got {value!r}"
        raise ValueError(f"field {name!r}: expected text, {found}")
    return value.strip()


def turns_of(value: Any) -> tuple[tuple[str, str], ...]:
    """Role and content of every message of a conversation; ValueError where it is none."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"field 'messages': expected a list of turns, got {value!r:.100}")
    turns = []
    for turn in value:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in ROLES
            or not isinstance(turn.get("content"), str)
        ):
            raise ValueError(
                f"field 'messages': expected turns with a role ({', '.join(ROLES)}) and content, got {turn!r:.100}"
            )
        turns.append((turn["role"], turn["content"].strip()))
    return tuple(turns)


def _asked(row: Mapping[str, Any]) -> tuple[tuple[tuple[str, str], ...], str]:
    """The turns before the question, and the question."""
    if "messages" not in row:
        return (), text_of(row, "question")
    if "question" in row:
        raise ValueError("expected one of the fields 'question' and 'messages'")
    *before, (role, question) = turns_of(row["messages"])
    if role != "user" or not question:
        raise ValueError(
            f"field 'messages': expected a question of the user last, got {role!r}: {question!r:.60}"
        )
    return tuple(before), question


def _with_choices(question: str, choices: Mapping[str, str]) -> str:
    """The question with its choices listed below, unless it lists them itself."""
    listed = all(
        re.search(rf"(?:^|\s)\(?{re.escape(label)}[.):]+\s*{re.escape(text)}", question)
        for label, text in choices.items()
    )
    return (
        question
        if listed
        else "\n".join([question, *(f"{label}. {text}" for label, text in choices.items())])
    )


def _content_id(row: Mapping[str, Any]) -> str:
    """The name of a problem without one: 16 hex digits of the SHA-256 of all that its row says, wherever the source lies."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _one_of(row: Mapping[str, Any], name: str, known: Sequence[str], default: str) -> str:
    value = row.get(name, default)
    if value not in known:
        raise ValueError(f"field {name!r}: expected one of {', '.join(known)}, got {value!r}")
    return str(value)
