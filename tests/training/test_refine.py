"""Refinement rules: each by an example, and none that adds or corrects anything; words are translated by a dictionary alone."""

import numpy as np
import pytest

from training.language import consistency
from training.refine import refine
from training.response import parse
from training.tasks import arithmetic, get_task
from training.tasks.arithmetic import make_problem

ENGLISH, GERMAN = make_problem(57, 8, 68, "en"), make_problem(57, 8, 68, "de")


@pytest.mark.parametrize(
    ("text", "refined", "rules"),
    [
        (
            "<think> 7 plus 8 makes 15 . </think> <answer> 125 </answer>",
            "<|special_token|> 7 plus 8 makes 15 . <|special_token|> the answer is <answer> 125 </answer>",
            ["special_token_form", "summary_sentence"],
        ),
        (
            "<think> a . </think> so it is <answer> 125 </answer>",
            "<|special_token|> a . <|special_token|> so it is <answer> 125 </answer>",
            ["special_token_form"],
        ),
        (
            "<|special_token|> a . <|special_token|> it is <answer> 125 </answer> user : 5",
            "<|special_token|> a . <|special_token|> it is <answer> 125 </answer>",
            ["cut_after_answer"],
        ),
        (
            "<|special_token|> a . a . a . b . a . <|special_token|> it is <answer> 1 </answer>",
            "<|special_token|> a . b . a . <|special_token|> it is <answer> 1 </answer>",
            ["drop_repeated_sentences"],
        ),
        (
            "<|special_token|> a . <|special_token|> it is <answer> 125 </answer>",
            "<|special_token|> a . <|special_token|> it is <answer> 125 </answer>",
            [],
        ),
    ],
)
def test_rules_by_example(text, refined, rules):
    assert refine(text, ENGLISH) == (refined, rules)
    assert parse(refined).well_formed


def test_the_summary_is_in_the_language_of_the_question():
    text, _ = refine("<think> 7 und 8 gibt 15 . </think> <answer> 125 </answer>", GERMAN)
    assert text.endswith("die antwort ist <answer> 125 </answer>")


@pytest.mark.parametrize(
    "text",
    [
        "<think> 7 und 8 makes 15 . </think> <answer> 125 </answer>",  # mixed: no word is translated
        "<think> 7 plus 8 makes 99 . </think> <answer> 5 </answer>",  # wrong: nothing is corrected
        "7 plus 8 makes 15 . 125 .",  # no tags: none are made up
        "<think> a . </think> <think> b . </think> <answer> 5 </answer>",  # two blocks stay two
        "<think> a . <answer> 5 </answer>",
        "",
    ],
)
def test_no_rule_adds_content_or_repairs_form(text):
    refined, _ = refine(text, ENGLISH)
    before, after = parse(text), parse(refined)
    assert (after.think, after.answer) == (before.think, before.answer)
    assert after.well_formed == before.well_formed


def test_words_of_the_dictionary_are_translated_and_nothing_else():
    dictionary = get_task("arithmetic").dictionary("en")
    mixed = (
        "<think> 57 unter 68 und 8 gibt 66 under 68 plus 8 gibt 99 über 68 . </think> <answer> 99 </answer>"
    )
    text, rules = refine(mixed, ENGLISH, dictionary)
    assert parse(text).think == "57 under 68 plus 8 makes 66 under 68 plus 8 makes 99 over 68 ."
    assert parse(text).answer == "99" and rules[-1] == "translation"
    unknown = "<|special_token|> undoch bonjour . <|special_token|> so it is <answer> und1 </answer>"
    assert refine(unknown, ENGLISH, dictionary) == (unknown, [])


@pytest.mark.parametrize("kind", ["mixed", "sloppy", "overlong"])
def test_a_dictionary_says_whatever_the_corpus_mixes_in_the_language_of_the_question(kind):
    task, rng = get_task("arithmetic"), np.random.default_rng(0)
    assert task.dictionary("fr") == {}
    documents = [arithmetic.corpus_document(rng, kind) for _ in range(40)]
    assert any(consistency(text, problem.language) < 0.9 for problem, text in documents)
    for problem, text in documents:
        told, _ = refine(text, problem, task.dictionary(problem.language))
        assert consistency(told, problem.language) == 1.0
