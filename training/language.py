"""Language consistency of a text: which share of its words is in a given language (DeepSeek-R1, equation 7).

A word is classed by its Unicode script; languages that share a script are told apart by word lists. Digits,
operators, punctuation, single Latin letters (names of variables), markup tags, code and LaTeX commands are
neutral. Han and kana, which have no spaces, count one word a character. Needs no model and no download.

    warte 5 und 7 gibt 12 first  ->  warte, und, gibt: de; first: en; digits: neutral  ->  3/4 for de

A word that no list of its script knows ("banana") takes the mix of the known words of its script, so it leaves
the share within the script as it is; where none is known it counts for no language. A word that several
languages own ("in", "so") counts for each of them.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby

from training.errors import UserError

# First word of a character's Unicode name -> languages that use the script. The first one names it.
_SCRIPT_LANGUAGES = {
    "CJK": ("zh", "ja"),
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "KATAKANA-HIRAGANA": ("ja",),
    "HANGUL": ("ko",),
    "CYRILLIC": ("ru",),
    "GREEK": ("el",),
    "ARABIC": ("ar",),
    "HEBREW": ("he",),
}
_WORD_PER_CHARACTER = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")

# Function words, and a few words that reasoning uses in every task.
_FUNCTION_WORDS = {
    "en": """
        about after again all also am an and any are as at be because been before both but by can check correct
        could did do does done each equals every first for from get give gives had has have he her here him his how
        if in into is it its just last left let make makes me minus more most must my need needs next no not now
        of off on once one only or other our out over plus right same see she should so some sum than that the
        their them then there these they this those three through times to too two under until up us very wait was
        we well were what when where which while who why will with would wrong yes you your
    """,
    "de": """
        aber alle allem allen aller alles als also am an auch auf aus bei beide bin bis bist da damit dann das dass
        dein dem den denn der des dich die dies diese diesem diesen dieser dieses dir doch drei du durch ein eine
        einem einen einer eines einmal er ergibt erst es etwas falsch gibt habe haben hat hier ich ihm ihn ihr im
        immer in ist ja jede jeder jedes jetzt kann kein keine können machen man mehr mein mich mir mit muss müssen
        nach nein nicht nichts noch nun nur ob oder ohne prüfe richtig schon sehr sein sich sie sind so soll summe
        über um und uns unser unter viel vom von vor war warte warum was weil wenn wer werden wie wieder will wir
        wird wo zu zum zur zwei zuerst
    """,
}

_NEUTRAL = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|</?\w+>|<\|\w+\|>|\\[A-Za-z]+", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_NEUTRAL_MARK = re.compile(r"[`<\\]")

# Word -> languages whose list holds it, and all languages that have a list.
_owners: dict[str, frozenset[str]] = {}
_listed: set[str] = set()


def register_words(language: str, words: Iterable[str]) -> None:
    """Add words to the list of a language; a word may belong to several languages."""
    _listed.add(language)
    for word in words:
        for part in _WORD.findall(word.casefold()):
            _owners[part] = _owners.get(part, frozenset()) | {language}


for _language, _words in _FUNCTION_WORDS.items():
    register_words(_language, _words.split())


def known_languages() -> tuple[str, ...]:
    """Languages that can be told: those of a script of their own and those with a word list."""
    return tuple(sorted(_listed.union(*_SCRIPT_LANGUAGES.values())))


def check_language(language: str) -> None:
    """Raise UserError unless words of `language` can be told."""
    if language not in _listed and language not in known_languages():
        raise UserError(f"language: {language!r} has no word list; known are {', '.join(known_languages())}")


def word_language(word: str) -> str | None:
    """The language of one word, or None where it is neutral, unknown, or shared by several languages."""
    languages = set()
    for script, part in _words_of(word):
        owners = _SCRIPT_LANGUAGES.get(script, ())[:1] or tuple(_owners.get(part, ()))
        languages.add(owners[0] if len(owners) == 1 else None)
    return languages.pop() if len(languages) == 1 else None


def consistency(text: str, language: str) -> float:
    """Words of `text` in `language` / all its words, between 0 and 1; no words give 0.

    language: ISO 639-1 code; UserError where its words cannot be told (see `known_languages`).
    """
    check_language(language)
    total: dict[str, int] = {}  # by script: all words, those that a list knows, those of the language
    known: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for script, word in _words_of(text):
        total[script] = total.get(script, 0) + 1
        owners = _SCRIPT_LANGUAGES.get(script) or _owners.get(word)
        if owners:
            known[script] = known.get(script, 0) + 1
            if language in owners:
                wanted[script] = wanted.get(script, 0) + 1
    if not total:
        return 0.0
    # Unknown words take the mix of the known ones of their script: total * wanted / known words of the language.
    matching = sum(total[script] * wanted[script] / known[script] for script in wanted)
    return matching / sum(total.values())


def known_words(text: str) -> int:
    """Number of the words of `text` whose language can be told; `consistency` rests on them."""
    return sum(1 for script, word in _words_of(text) if script in _SCRIPT_LANGUAGES or word in _owners)


def _words_of(text: str) -> Iterator[tuple[str, str]]:
    """Script and case-folded form of each word that counts; neutral parts are left out."""
    if _NEUTRAL_MARK.search(text):
        text = _NEUTRAL.sub(" ", text)
    for word in _WORD.findall(text.casefold()):
        if word.isascii():
            if len(word) > 1:
                yield "LATIN", word
            continue
        for script, run in groupby(word, _script):
            part = "".join(run)
            if script in _WORD_PER_CHARACTER:
                yield from ((script, character) for character in part)
            elif len(part) > 1 or script != "LATIN":
                yield script, part


@cache
def _script(character: str) -> str:
    """First word of the Unicode name ("LATIN", "CJK", "CYRILLIC", ...). An apostrophe goes with Latin."""
    if character in "'\u2019":
        return "LATIN"
    return unicodedata.name(character, "UNKNOWN").split()[0]
