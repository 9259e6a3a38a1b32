"""Equality of mathematical answers: exact for plain numbers, symbolic through math-verify for everything else.

Only the text of an answer block comes here. Where it holds boxes, the last one counts, for a first box is often a
guess that the model gave up. A number must be answered by a number ("2+3" is no answer to "what is 2+3?"), and
several values ("3 or 5", "3 = 5") equal no single one.
"""

import re
import threading
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from training.errors import UserError
from training.tasks.problem import DataError

_TIMEOUT_SECONDS = 5
_LONGEST_ANSWER = 1000  # characters; anything longer is no answer and would only keep the parser busy
_NUMBER = re.compile(r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+)(?:/(\d+))?")
_FRACTION = re.compile(r"\\[dt]?frac\{([+-]?\d+)\}\{(\d+)\}")
_CURRENCY = re.compile(r"\\?\$")
_NAME_AND_EQUALS = re.compile(r"^[A-Za-z](?:_\w|_\{\w+\})?\s*=(?!=)")
_ALTERNATIVES = (r"\vee", r"\lor", r"\mid", ";", "|", "=")
_WORD_OF_THREE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_BOX = "\\boxed{"


def plain_number(text: str) -> Fraction | None:
    """The value of a plain number ("-3", "1,000", "0.5", "1/2", "\\frac{1}{2}", "$5"), or None for anything else."""
    text = _FRACTION.sub(r"\1/\2", _CURRENCY.sub("", text)).strip()
    match = _NUMBER.fullmatch(text) if len(text) <= 100 else None
    if match is None:
        return None
    numerator, denominator = Fraction(match[1].replace(",", "")), int(match[2] or 1)
    return numerator / denominator if denominator else None


def last_box(text: str) -> str:
    """The content of the last `\\boxed{...}`, or the whole text where there is none or it is never closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return text
    depth = 0
    for position in range(start + len(_BOX) - 1, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start + len(_BOX) : position]
    return text


def looks_mathematical(text: str) -> bool:
    """Whether a reference reads as mathematics: it has a digit or a LaTeX command, and no word of three letters."""
    return ("\\" in text or any(map(str.isdigit, text))) and not _WORD_OF_THREE.search(text)


def check_reference(reference: str) -> None:
    """Raise DataError where a reference cannot be parsed, UserError where math-verify is needed and missing."""
    if plain_number(last_box(reference)) is None:
        _parse_reference(last_box(reference))


def equal(reference: str, answer: str) -> bool:
    """Whether the answer has the value of the reference.

    Args:
        reference: the right answer, plain or as LaTeX; DataError where it cannot be parsed, never a reward.
        answer: text of the answer block, which may be anything. A leading "x =" is skipped.

    Runs in any thread. On the main thread a symbolic comparison is stopped after a few seconds; elsewhere the
    signal that does it cannot be used.
    """
    reference, answer = last_box(reference), last_box(answer).strip()
    wanted = plain_number(reference)
    gold = _parse_reference(reference) if wanted is None else None
    if "=" not in reference:
        answer = _NAME_AND_EQUALS.sub("", answer)
    if wanted is not None:
        return plain_number(answer) == wanted
    if not answer or len(answer) > _LONGEST_ANSWER:
        return False
    if any(sign in answer and sign not in reference for sign in _ALTERNATIVES):
        return False
    import math_verify

    return bool(math_verify.verify(gold, _parse(answer), timeout_seconds=_timeout()))


def _timeout() -> int | None:
    """math-verify's timeouts are alarm signals, which raise off the main thread."""
    return _TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None


def _parse(text: str) -> list[Any]:
    """What math-verify reads in the text as a whole (in dollars, so that it picks no single number out of it)."""
    from math_verify import parse

    parsed: list[Any] = parse(f"${_CURRENCY.sub('', text)}$", parsing_timeout=_timeout())
    return parsed


@lru_cache(maxsize=4096)
def _parse_reference(reference: str) -> list[Any]:
    if find_spec("math_verify") is None:
        raise UserError(
            f"the reference {reference!r} is no plain number: its check needs `pip install math-verify`"
        )
    parsed = _parse(reference) if reference.strip() else []
    if all(isinstance(value, str) for value in parsed):
        raise DataError(f"the reference {reference[:100]!r} cannot be parsed as mathematics")
    return parsed
