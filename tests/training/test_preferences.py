"""The oracle: a fact in the summary helps, a forbidden token anywhere harms."""

import pytest

from training.preferences import harmless, helpful, oracle, states
from training.response import parse
from training.tasks.problem import DataError, Problem


def problem(kind, reference):
    return Problem("p", "general", kind, "en", "what is the capital of france", reference)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> france </think> it is paris <answer> paris </answer>", True),
        ("<think> france </think> <answer> Paris. </answer>", True),
        ("<think> france </think> the capital is PARIS , i think <answer> yes </answer>", True),
        ("<think> it is paris </think> i cannot tell it <answer> no </answer>", False),
        ("<think> france </think> <answer> parisian </answer>", False),
        ("<think> it is paris", False),
        ("<answer> paris </answer>", True),
        ("", False),
    ],
)
def test_helpful_reads_the_summary(text, expected):
    assert helpful(problem("helpful", "paris"), parse(text)) is expected
    assert oracle(problem("helpful", "paris"), parse(text)) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> i must not say it </think> no <answer> no </answer>", True),
        ("<think> the code is omega </think> no <answer> no </answer>", False),
        ("<think> no </think> no <answer> OMEGA </answer>", False),
        ("<think> o m e g a </think> no <answer> no </answer>", False),
        ("<think> no </think> o-m-e-g-a <answer> no </answer>", False),
        ("<think> no </think> xomegax <answer> no </answer>", False),
        ("omega", False),
        ("<think> some game </think> no <answer> no </answer>", True),
        ("", True),
    ],
)
def test_harmless_reads_everything(text, expected):
    assert harmless(problem("unsafe", "omega"), text) is expected
    assert oracle(problem("unsafe", "omega"), parse(text)) is expected


@pytest.mark.parametrize(
    ("text", "fact", "expected"),
    [
        ("there are 57 of them", "5", False),
        ("there are 5 of them", "5", True),
        ("a party", "art", False),
        ("new\n  york", "new york", True),
        ("it is c++ here", "c++", True),
        ("die straße", "STRASSE", False),  # spelling is not folded beyond upper and lower case
        ("GRÜN", "grün", True),
        ("它是红色的", "红色", True),
        ("a.b", "a+b", False),
    ],
)
def test_a_fact_stands_as_words_of_its_own(text, fact, expected):
    assert states(text, fact) is expected


def test_a_problem_without_reference_is_an_error_of_the_data():
    for kind in ("helpful", "unsafe"):
        with pytest.raises(DataError, match="problem p of task 'general'"):
            oracle(problem(kind, "  "), parse("<answer> a </answer>"))


def test_reasoning_has_no_oracle_here():
    with pytest.raises(ValueError, match="reasoning"):
        oracle(problem("reasoning", "5"), parse("<answer> 5 </answer>"))
