r"""One spelling for answers that people and models write in many: what decorates an answer goes, what it says stays.

**72.**   \(72\)   `72`   $72$   \boxed{72}   \text{72}   1{,}000   and signs of Unicode: minus, full-width digits, powers
"""

import re
import unicodedata
from functools import lru_cache

from training.response import last_box

# One sign for all that look alike or mean the same; superscripts are no digits of their own.
_SIGNS = str.maketrans(
    {
        "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-",
        "\u2044": "/", "\u2215": "/", "\u00f7": "/", "\u00a0": "~", "\u2009": "~", "\u202f": "~", "\u2007": "~",
        "\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u3002": ".", "\u3001": ",",
        "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ",
        "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u222a": r"\cup ", "\u2229": r"\cap ",
        "\u2205": r"\emptyset ", "\u00b1": r"\pm ", "\u221a": r"\surd ",
        **{sign: f"^{digit}" for digit, sign in enumerate("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")},
    }
)  # fmt: skip
_VULGAR = re.compile("([\u00bc-\u00be\u2150-\u215e])")
_TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|bf|rm)\s*\{([^{}]*)\}"
)
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])\s?|\\[!]|\\\n"
)
_SPACE_COMMAND = re.compile(r"\\[,;:> ]|\\q?quad(?![A-Za-z])|~")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;: ]|~)(?=\d{3}(?!\d))")
_DEGREES = re.compile(r"\^?\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?")
_PLAIN_FUNCTION = re.compile(r"(?<![\\A-Za-z])(pi|infinity|infty|sqrt)(?![A-Za-z])")
_PLAIN_ROOT = re.compile(r"\\(?:sqrt|surd)\s*(?:\(([^()]*)\)|([\dA-Za-z]+))")
_WRAPPED = (
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
    ("$$", "$$"),
    ("$", "$"),
)
_LEAD_IN = re.compile(r"^(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:)\s*", re.IGNORECASE)
_BRACKETED = ((r"\(", r"\)"), (r"\[", r"\]"))
_LONGEST = 2000  # characters
_SENTENCE_END = ".,;:"


@lru_cache(maxsize=4096)
def undecorated(text: str) -> str:
    """The text of an answer without boxes, emphasis, quotes, dollars, text commands, layout, "the answer is" before it and a
    full stop behind it.

    What is too long for an answer comes back with its boxes alone taken off.
    """
    box = last_box(text)
    text = text if box is None else box
    if len(text) > _LONGEST:
        return " ".join(text.split())
    text = text.translate(_SIGNS)
    text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[1])}", text).replace(
        "\u2044", "/"
    )
    text = "".join(
        unicodedata.normalize("NFKC", each) if "\uff01" <= each <= "\uff5e" else each for each in text
    )
    text = _LAYOUT.sub("", _BETWEEN_DIGITS.sub(",", text))
    text = _DEGREES.sub("\u00b0", _SPACE_COMMAND.sub(" ", text)).replace(r"\%", "%").replace(r"\$", "$")
    while (shorter := _TEXT_COMMAND.sub(r"\1", text)) != text:
        text = shorter
    text = _LEAD_IN.sub("", _bare(text), count=1)
    return " ".join(_bare(text).split())


def as_latex(text: str) -> str:
    """Names of plain text as commands ("sqrt(2)", "pi", "x**2"), and a set in bare braces as one."""
    text = _PLAIN_FUNCTION.sub(lambda match: "\\infty " if match[1][0] == "i" else f"\\{match[1]} ", text)
    text = _PLAIN_ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text).replace("**", "^")
    if text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        return rf"\{{{text[1:-1]}\}}"
    return text


def _bare(text: str) -> str:
    while (shorter := _unwrapped(text)) != text:
        text = shorter
    return text


def _unwrapped(text: str) -> str:
    text = text.strip()
    for opening, closing in (*_WRAPPED, *_BRACKETED):
        inner = text[len(opening) : -len(closing)]
        if (
            text.startswith(opening)
            and text.endswith(closing)
            and inner
            and len(text) > len(opening) + len(closing) - 1
        ):
            apart = opening not in inner if opening == closing else closing not in inner
            if apart:
                return inner.strip()
    return text.rstrip(_SENTENCE_END) or text
