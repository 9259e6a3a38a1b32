"""Equality of mathematical answers: exact for numbers and quantities, symbolic through math-verify for everything else.

Only the text of an answer comes here. Where it holds boxes, the last one counts, for a first box is often a guess that
the model gave up. A number must be answered by a number ("2+3" is no answer to "what is 2+3?"), and several values
("3 or 5", "3 = 5") equal no single one.
"""

import re
import threading
from functools import cache
from importlib.util import find_spec
from typing import Any

from training.errors import UserError
from training.notation import as_latex, undecorated
from training.quantities import Quantity, quantity, same
from training.tasks.problem import DataError

_TIMEOUT_SECONDS = 5
_LONGEST_ANSWER = 1000  # characters; anything longer is no answer and would only keep the parser busy
_NAME_AND_EQUALS = re.compile(r"^(?:[A-Za-z](?:_\w|_\{\w+\})?\s*)?=(?!=)")
_ALTERNATIVES = (r"\vee", r"\lor", r"\mid", ";", "|", "=")
_WORD_OF_THREE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
# Languages that write 3.5 as "3,5", by the decimal separators of Unicode's CLDR; a region of one may do otherwise.
_DECIMAL_COMMA = set(
    [
        "af",
        "az",
        "be",
        "bg",
        "bs",
        "ca",
        "cs",
        "da",
        "de",
        "el",
        "es",
        "et",
        "eu",
        "fi",
        "fo",
        "fr",
        "gl",
        "hr",
        "hu",
        "hy",
        "id",
        "is",
        "it",
        "ka",
        "kk",
        "ky",
        "lb",
        "lt",
        "lv",
        "mk",
        "nb",
        "nl",
        "nn",
        "no",
        "pl",
        "pt",
        "ro",
        "ru",
        "sk",
        "sl",
        "sq",
        "sr",
        "sv",
        "tr",
        "uk",
        "uz",
        "vi",
    ]
)
_NUMBER_WITH_COMMA = re.compile(r"(?<![\d.,])(\d{1,3}(?:[. ]\d{3})+|\d+)(?:,(\d+))?(?![.,]?\d)")


def looks_mathematical(text: str, language: str = "") -> bool:
    """Whether a reference reads as mathematics: a quantity, or a digit or a LaTeX command and no word of three letters."""
    plain = undecorated(text)
    if any(quantity(undecorated(each)) is not None for each in _readings(text, language)):
        return True
    return ("\\" in plain or any(map(str.isdigit, plain))) and not _WORD_OF_THREE.search(plain)


def check_reference(reference: str, language: str = "") -> None:
    """Raise DataError where a reference cannot be parsed, UserError where math-verify is needed and missing."""
    for each in _readings(reference, language):
        _gold(each)


def equal(reference: str, answer: str, language: str = "") -> bool:
    """Whether the answer has the value of the reference.

    Args:
        reference: the right answer, plain or as LaTeX; DataError where it cannot be parsed, never a reward.
        answer: text of the answer, which may be anything. A leading "x =" is skipped.
        language: of the question. In one that writes "3,5" for 3.5 a number is read with decimal comma and with decimal point,
            and "1.234", which is two numbers then, equals both.

    Runs in any thread. On the main thread a symbolic comparison is stopped after a few seconds; elsewhere the
    signal that does it cannot be used.
    """
    return any(
        _equal(wanted, given)
        for wanted in _readings(reference, language)
        for given in _readings(answer, language)
    )


def _readings(text: str, language: str) -> list[str]:
    """What a text may say: as it stands, and with the commas of its number as decimal points."""
    plain = undecorated(text).replace("{,}", ",")
    if language.split("-")[0].lower() not in _DECIMAL_COMMA or plain.startswith(("(", "[", "{", "\\")):
        return [text]
    other = _NUMBER_WITH_COMMA.sub(
        lambda match: re.sub("[. ]", "", match[1]) + (f".{match[2]}" if match[2] else ""), plain
    )
    if other == plain or quantity(_NAME_AND_EQUALS.sub("", other).strip()) is None:
        return [text]
    return [text, other] if quantity(plain) is not None else [other]


def _equal(reference: str, answer: str) -> bool:
    wanted, gold = _gold(reference)
    given = undecorated(answer)
    if "=" not in wanted:
        given = _NAME_AND_EQUALS.sub("", given).strip()
    if isinstance(gold, Quantity):
        found = quantity(given)
        return found is not None and same(gold, found)
    if not given or len(given) > _LONGEST_ANSWER:
        return False
    if any(sign in given and sign not in wanted for sign in _ALTERNATIVES):
        return False
    if given == wanted:
        return True
    import math_verify

    return bool(math_verify.verify(gold, _parse(given), timeout_seconds=_timeout()))


def _timeout() -> int | None:
    """math-verify's timeouts are alarm signals, which raise off the main thread."""
    return _TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None


def _parse(text: str) -> list[Any]:
    """What math-verify reads in the text as a whole (in dollars, so that it picks no single number out of it)."""
    from math_verify import parse

    parsed: list[Any] = parse(f"${as_latex(text).replace('$', '')}$", parsing_timeout=_timeout())
    return parsed


@cache
def _gold(reference: str) -> tuple[str, Quantity | list[Any]]:
    """A reference without decoration, and what it says; each is read once in a process, for parsing is slow."""
    wanted = undecorated(reference)
    number = quantity(wanted)
    if number is not None:
        return wanted, number
    if find_spec("math_verify") is None:
        raise UserError(
            f"the reference {reference!r} is no plain number: its check needs `pip install math-verify`"
        )
    parsed = _parse(wanted) if wanted else []
    if all(isinstance(value, str) for value in parsed):
        raise DataError(f"the reference {reference[:100]!r} cannot be parsed as mathematics")
    return wanted, parsed
