"""The right answer of a problem, and whether a response gives it: by value, by text, or by the letter of a choice."""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from training import mathematics
from training.notation import undecorated
from training.response import after_lead_in, last_box
from training.tasks.problem import DataError

CHECKS = ("mathematics", "text", "choice")
LONGEST_TEXT = 200  # characters; no response repeats a longer text letter by letter

_LABELLED = re.compile(
    r"(?:(?:option|choice|answer)\s+)?\(?(?P<label>\w)\)?(?:[.):]+\s*|\s+|$)(?P<text>.*)", re.IGNORECASE
)
_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.):]\s.*)?", re.DOTALL)


def short_answer(text: str) -> str:
    """The answer in a reference as data sets write them: "... #### 72" (GSM8K), "... \\boxed{5}" (MATH), "the answer is 5".

    A text without any of these is the answer itself.
    """
    _, mark, behind = text.rpartition("####")
    if mark:
        return behind.strip()
    box = last_box(text)
    return (box if box is not None else after_lead_in(text) or text).strip()


def check_of(reference: str, choices: Mapping[str, str], language: str = "") -> str:
    """How answers to a reference are checked, by the look of it: a name from CHECKS. language: of the question."""
    if choices:
        return "choice"
    return "mathematics" if mathematics.looks_mathematical(reference, language) else "text"


def labelled(choices: Any) -> dict[str, str]:
    """Label -> text of the choices of a question, from a list or from {"text": [...], "label": [...]} (as ARC has them)."""
    labels: Sequence[Any] = ascii_uppercase
    if isinstance(choices, Mapping) and set(choices) == {"text", "label"}:
        choices, labels = choices["text"], choices["label"]
        if (
            not isinstance(labels, list)
            or len(labels) != len(choices)
            or len(set(map(str, labels))) != len(labels)
        ):
            raise ValueError(
                f"field 'choices': expected a label of its own for each text, got {labels!r:.100}"
            )
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise ValueError(f"field 'choices': expected a list of 2 to 26 texts, got {choices!r:.100}")
    return {str(label).upper(): str(text).strip() for label, text in zip(labels, choices, strict=False)}


def chosen(answer: Any, choices: Mapping[str, str]) -> str:
    """The label that the field "answer" means: a label, an index from 0 (a number, not text), or the text of a choice."""
    labels = list(choices)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(labels):
        return labels[answer]
    found = choice_of(short_answer(answer), choices) if isinstance(answer, str) else None
    if found is None:
        raise DataError(
            f"the answer {answer!r} is none of the choices {', '.join(labels)}, nor the index or text of one"
        )
    return found


def choice_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """The label of the one choice that an answer names by its label, its text or both; None where it names none or several."""
    answer = undecorated(answer)
    match = _LABELLED.fullmatch(answer)
    if match and match["label"].upper() in choices:
        label = match["label"].upper()
        if not match["text"] or _plain(match["text"]) == _plain(choices[label]):
            return label
    named = [label for label, text in choices.items() if right(check_of(text, {}), text, answer)]
    return named[0] if len(named) == 1 else None


def check_reference(
    check: str, reference: str, choices: Mapping[str, str] | None = None, language: str = ""
) -> None:
    """Raise DataError where no response can ever match the reference, UserError where math-verify is needed and missing."""
    if check == "mathematics":
        mathematics.check_reference(reference, language)
    elif check == "text" and (len(reference) > LONGEST_TEXT or "\n" in reference):
        raise DataError(
            f"no response can equal this answer of {len(reference)} characters: let it end with '#### ANSWER' or with "
            f"\\boxed{{ANSWER}} ({reference[:60]!r} ...)"
        )
    if not right(check, reference, reference, choices, language):
        raise DataError(
            f"no response can match the answer {reference[:100]!r}: its own check ({check}) refuses it"
        )


def right(
    check: str, reference: str, answer: str, choices: Mapping[str, str] | None = None, language: str = ""
) -> bool:
    """Whether an answer is right, by the check of that name; see `mathematics.equal` for values and the language of the question.

    Texts are compared without regard to case, spaces and decoration; a letter may stand in brackets, or before its text.
    """
    if check == "mathematics":
        return mathematics.equal(reference, answer, language)
    if check == "choice":
        return choice_of(answer, choices or {}) == reference
    plain = undecorated(answer)
    letter = _LETTER.fullmatch(plain) if len(reference) == 1 and reference.isalpha() else None
    return _plain(letter[1] if letter else plain) == _plain(reference)


def _plain(text: str) -> str:
    return undecorated(text).rstrip("!").casefold()
