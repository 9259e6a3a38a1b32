"""Language consistency, equation 7 of the DeepSeek-R1 paper, by hand-counted words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import UserError
from training.language import check_language, consistency, known_languages, register_words, word_language


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("first we check the sum", "en", 1.0),
        ("first we check the sum", "de", 0.0),
        ("warte 5 und 7 gibt 12 first", "de", 3 / 4),
        ("warte 5 und 7 gibt 12 first", "en", 1 / 4),
        ("Wir WARTEN nicht", "de", 1.0),
        # "in" and "was" are words of both languages, so they count for either.
        ("in was", "en", 1.0),
        ("in was", "de", 1.0),
        ("in was wir", "en", 2 / 3),
        # Han and kana count one word a character: 5 of 7 words are Chinese.
        ("我们先加起 the sum", "zh", 5 / 7),
        ("我们先加起 the sum", "en", 2 / 7),
        ("これは和です", "ja", 1.0),
        ("сначала мы the", "ru", 2 / 3),
        ("먼저 the", "ko", 1 / 2),
        ("don't we", "en", 1.0),
        # Single Latin letters are names of variables.
        ("wir x a nicht", "de", 1.0),
        ("设 x 等于 5", "zh", 1.0),
    ],
)
def test_hand_counted(text, language, expected):
    assert consistency(text, language) == pytest.approx(expected)


def test_unknown_words_take_the_mix_of_their_script():
    # Three words of two languages known, three unknown: 2/3 of the six Latin words count.
    assert consistency("we and wir qwx brz plf", "en") == pytest.approx(2 / 3)
    # Beside Chinese they are still Latin words: 2 Han characters and 3 Latin words.
    assert consistency("你好 qwx brz plf", "zh") == pytest.approx(2 / 5)
    assert consistency("qwx brz", "en") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "5 + 7 = 12",
        "x * y",
        "</think> <answer>",
        "```\nthe sum of the two\n```",
        "`the sum`",
        "\\frac{1}{2}",
    ],
)
def test_no_words_earn_nothing(text):
    assert consistency(text, "en") == 0.0


def test_code_tags_and_latex_are_neutral():
    assert consistency("wir prüfen und `return the sum` \\frac{1}{2} <answer> nun", "de") == 1.0
    assert consistency("wir ```for the first time```", "de") == 1.0
    assert consistency("wir ```the block is never closed", "de") == 1.0


def test_registered_words_are_known():
    assert word_language("zorblax") is None
    register_words("eo", ["zorblax", "Grimpf"])
    assert word_language("ZORBLAX") == "eo"
    assert consistency("zorblax grimpf the", "eo") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("we", "en"),
        ("wir", "de"),
        ("können", "de"),
        ("in", None),
        ("x", None),
        ("12", None),
        ("", None),
        ("你", "zh"),
        ("の", "ja"),
        ("привет", "ru"),
        ("안녕", "ko"),
        ("we wir", None),
    ],
)
def test_word_language(word, expected):
    assert word_language(word) == expected


def test_a_language_that_cannot_be_told_is_an_error():
    with pytest.raises(UserError, match=r"'xx'.*de, el, en"):
        consistency("text", "xx")
    with pytest.raises(UserError, match="'xx'"):
        check_language("xx")
    assert {"en", "de", "zh", "ja", "ko", "ru"} <= set(known_languages())


@given(st.text(), st.sampled_from(["en", "de", "zh", "ja", "ru"]))
def test_always_a_share(text, language):
    assert 0.0 <= consistency(text, language) <= 1.0
    assert consistency(text, language) == consistency(text, language)


@given(st.lists(st.sampled_from(["we", "the", "and", "wir", "nicht", "5", "+"]), max_size=30))
def test_two_languages_share_all_known_words(words):
    text = " ".join(words)
    english = sum(word in ("we", "the", "and") for word in words)
    german = sum(word in ("wir", "nicht") for word in words)
    if english + german:
        assert consistency(text, "en") == pytest.approx(english / (english + german))
        assert consistency(text, "de") == pytest.approx(german / (english + german))
    else:
        assert consistency(text, "en") == 0.0
