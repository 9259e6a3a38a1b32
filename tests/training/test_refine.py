"""Refinement rules: each by an example, and none that adds or corrects anything."""

import pytest

from training.refine import refine
from training.response import parse
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
