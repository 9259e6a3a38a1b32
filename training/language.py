"""Language consistency of a text: which share of its words is in a given language (DeepSeek-R1, equation 7).

A word is classed by its Unicode script; languages that share a script are told apart by lists of function words: those
below for English, German and the words of the tasks, those of the package stopwordsiso for all others. Digits,
operators, punctuation, single Latin letters (names of variables), markup tags, code and LaTeX commands are
neutral. Han and kana, which have no spaces, count one word a character. Needs no model and no download.

    warte 5 und 7 gibt 12 first  ->  warte, und, gibt: de; first: en; digits: neutral  ->  3/4 for de

A word that no list of its script knows ("banana") takes the mix of the known words of its script, so it leaves
the share within the script as it is; where none is known it counts for no language that writes in Latin letters, and
for every language of any other script. A word that several languages own ("in", "so") counts for each of them.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby

import regex

from training.errors import UserError

# First word of a character's Unicode name -> languages that use the script. The first one names it.
_SCRIPT_LANGUAGES = {
    "CJK": ("zh", "ja"),
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "KATAKANA-HIRAGANA": ("ja",),
    "HANGUL": ("ko",),
    "CYRILLIC": ("ru", "uk", "bg"),
    "GREEK": ("el",),
    "ARABIC": ("ar", "fa", "ur"),
    "HEBREW": ("he",),
    "DEVANAGARI": ("hi", "mr"),
    "BENGALI": ("bn",),
    "GUJARATI": ("gu",),
    "GURMUKHI": ("pa",),
    "TAMIL": ("ta",),
    "TELUGU": ("te",),
    "KANNADA": ("kn",),
    "MALAYALAM": ("ml",),
    "SINHALA": ("si",),
    "THAI": ("th",),
    "LAO": ("lo",),
    "KHMER": ("km",),
    "MYANMAR": ("my",),
    "ETHIOPIC": ("am",),
    "ARMENIAN": ("hy",),
    "GEORGIAN": ("ka",),
}
_WORD_PER_CHARACTER = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
_LISTED_SCRIPTS = ("LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI")  # whose languages are told apart by lists
# of those in _SCRIPT_LANGUAGES
_LETTER_OWNERS = {
    **dict.fromkeys("іїєґ", "uk"),
    **dict.fromkeys("ыэё", "ru"),
}

_TAG = re.compile(r"[a-z]{2,3}(?:-[a-z0-9]{1,8})*", re.IGNORECASE)
_SAME = {"nb": "no", "nn": "no", "iw": "he", "in": "id", "fil": "tl", "cmn": "zh", "yue": "zh"}

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
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}]*(?:['\u2019]\p{L}[\p{L}\p{M}]*)*")
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


@cache
def _library() -> dict[str, frozenset[str]]:
    """Word -> languages of stopwordsiso that have it, in their own script, but for English and German."""
    try:
        from stopwordsiso import langs, stopwords
    except ModuleNotFoundError:
        raise UserError(
            "languages are told by the word lists of a package that is missing: `pip install stopwordsiso`"
        ) from None
    owners: dict[str, frozenset[str]] = {}
    for code in langs() - set(_FUNCTION_WORDS):
        own = [script for script, users in _SCRIPT_LANGUAGES.items() if code in users] or ["LATIN"]
        for entry in stopwords(code):
            for script, word in _words_of(entry):
                if script in own and script in _LISTED_SCRIPTS:
                    owners[word] = owners.get(word, frozenset()) | {code}
    return owners


@cache
def known_languages() -> tuple[str, ...]:
    """Languages that can be told: those of a script of their own and those with a word list."""
    return tuple(sorted(set(_FUNCTION_WORDS).union(*_SCRIPT_LANGUAGES.values(), *_library().values())))


def tag(text: str) -> str:
    """A language tag as BCP 47 spells it, its first part in small letters ("zh-CN", "de"); ValueError where it is none."""
    spelt = text.replace("_", "-")
    if not _TAG.fullmatch(spelt):
        raise ValueError(f"language: expected a tag such as de or zh-CN, got {text!r}")
    first, *rest = spelt.split("-")
    return "-".join([first.lower(), *rest])


def primary(language: str) -> str:
    """The language that a tag means: "zh" for "zh-CN", "no" for "nb"."""
    first = language.split("-")[0].casefold()
    return _SAME.get(first, first)


def is_known(language: str) -> bool:
    """Whether words of a language (any BCP-47 tag) can be told."""
    return primary(language) in _listed or primary(language) in known_languages()


def check_language(language: str) -> None:
    """Raise UserError unless words of `language` can be told."""
    if not is_known(language):
        raise UserError(f"language: {language!r} has no word list; known are {', '.join(known_languages())}")


def word_language(word: str) -> str | None:
    """The language of one word, or None where it is neutral, unknown, or shared by several languages."""
    languages = set()
    for script, part in _words_of(word):
        first = _SCRIPT_LANGUAGES.get(script, ())[:1]
        owners = tuple(_owners.get(part, ()) or _owners_of(script, part)) or first
        if script not in _LISTED_SCRIPTS:
            owners = first
        languages.add(owners[0] if len(owners) == 1 else None)
    return languages.pop() if len(languages) == 1 else None


def consistency(text: str, language: str) -> float:
    """Words of `text` in `language` / all its words, between 0 and 1; no words give 0.

    language: BCP-47 tag; UserError where its words cannot be told (see `known_languages`).
    """
    check_language(language)
    code = primary(language)
    total: dict[str, int] = {}  # by script: all words, those that a list knows, those of the language
    known: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for script, word in _words_of(text):
        total[script] = total.get(script, 0) + 1
        owners = _owners_of(script, word)
        if owners:
            known[script] = known.get(script, 0) + 1
            if code in owners:
                wanted[script] = wanted.get(script, 0) + 1
    if not total:
        return 0.0
    # Unknown words take the mix of the known ones of their script: total * wanted / known words of the language.
    matching = sum(total[script] * wanted[script] / known[script] for script in wanted)
    matching += sum(
        count
        for script, count in total.items()
        if script not in known and code in _SCRIPT_LANGUAGES.get(script, ())
    )
    return matching / sum(total.values())


def _owners_of(script: str, word: str) -> Iterable[str]:
    """The languages that own a word, empty where no list knows it; a script without lists owns all its words."""
    if script == "CYRILLIC" and not _LETTER_OWNERS.keys().isdisjoint(word):
        return {_LETTER_OWNERS[letter] for letter in word if letter in _LETTER_OWNERS}
    if script in _LISTED_SCRIPTS:
        return _owners.get(word, frozenset()) | _library().get(word, frozenset())
    return _SCRIPT_LANGUAGES.get(script, ())


def known_words(text: str) -> int:
    """Number of the words of `text` whose language can be told; `consistency` rests on them."""
    return sum(
        script in _SCRIPT_LANGUAGES or bool(_owners_of(script, word)) for script, word in _words_of(text)
    )


def _words_of(text: str) -> Iterator[tuple[str, str]]:
    """Script and case-folded form of each word that counts; neutral parts are left out."""
    text = unicodedata.normalize("NFC", text)
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
    """First word of the Unicode name ("LATIN", "CJK", "CYRILLIC", ...). An apostrophe or accent goes with Latin."""
    first = "LATIN" if character in "'\u2019" else unicodedata.name(character, "UNKNOWN").split()[0]
    return "LATIN" if first == "COMBINING" else first
