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


def looks_mathematical(text: str) -> bool:
    """Whether a reference reads as mathematics: a quantity, or a digit or a LaTeX command and no word of three letters."""
    plain = undecorated(text)
    if quantity(plain) is not None:
        return True
    return ("\\" in plain or any(map(str.isdigit, plain))) and not _WORD_OF_THREE.search(plain)


def check_reference(reference: str) -> None:
    """Raise DataError where a reference cannot be parsed, UserError where math-verify is needed and missing."""
    _gold(reference)


def equal(reference: str, answer: str) -> bool:
    """Whether the answer has the value of the reference.

    Args:
        reference: the right answer, plain or as LaTeX; DataError where it cannot be parsed, never a reward.
        answer: text of the answer, which may be anything. A leading "x =" is skipped.

    Runs in any thread. On the main thread a symbolic comparison is stopped after a few seconds; elsewhere the
    signal that does it cannot be used.
    """
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
