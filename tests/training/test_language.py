"""Language consistency, equation 7 of the DeepSeek-R1 paper, by hand-counted words."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.characters import ALL
from training.errors import UserError
from training.language import check_language, consistency, known_languages, register_words, word_language
from training.language import tag as tag_of


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


@given(st.text(ALL), st.sampled_from(["en", "de", "zh", "ja", "ru"]))
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


# The first article of the Universal Declaration of Human Rights, or its beginning, by language.
ARTICLE = json.loads(Path(__file__).parents[1].joinpath("support/human_rights.json").read_text("utf-8"))


@pytest.mark.parametrize("language", ARTICLE)
def test_a_text_is_most_of_all_in_its_own_language(language):
    text = ARTICLE[language]
    shares = {other: consistency(text, other) for other in ARTICLE}
    # the short list of Afrikaans holds little that is not Dutch too
    near = {"af": "nl"}.get(language, language)
    assert shares[near] == max(shares.values()) and shares[language] > 0.6
    if language != "en":
        assert shares["en"] < 0.4 and consistency(ARTICLE["en"], language) < 0.4
        assert consistency(f"{text} and they should act towards one another", language) < shares[language]


def test_at_least_thirty_languages_are_told():
    assert len(ARTICLE) >= 30 and len(known_languages()) >= 60


@pytest.mark.parametrize(
    ("tag", "language"),
    [("zh-CN", "zh"), ("de-DE", "de"), ("pt-BR", "pt"), ("nb", "no"), ("zh-Hant-TW", "zh"), ("fil", "tl")],
)
def test_a_tag_means_its_language(tag, language):
    check_language(tag)
    assert consistency(ARTICLE.get(language, "ang"), tag) == consistency(
        ARTICLE.get(language, "ang"), language
    )


@pytest.mark.parametrize(
    ("text", "expected"), [("de", "de"), ("ZH-CN", "zh-CN"), ("pt_BR", "pt-BR"), ("xx", "xx"), ("haw", "haw")]
)
def test_any_tag_is_spelt_as_bcp_47_does(text, expected):
    assert tag_of(text) == expected


@pytest.mark.parametrize("text", ["", "german", "d", "de-", "de DE", "42"])
def test_what_is_no_tag_is_refused(text):
    with pytest.raises(ValueError, match="expected a tag such as de or zh-CN"):
        tag_of(text)
