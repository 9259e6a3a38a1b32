"""Tasks by name, the hash split, and countdown with its parser."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import UserError
from training.language import consistency
from training.response import parse
from training.tasks import get_task
from training.tasks.countdown import evaluate
from training.tasks.problem import Problem, problem_id, split_of

# ------------------------------------------------------------------------------------------------ problems and splits


def test_the_id_tells_problems_apart():
    parts = [
        ("t", "1", "q", "en"),
        ("u", "1", "q", "en"),
        ("t", "2", "q", "en"),
        ("t", "1", "r", "en"),
        ("t", "1", "q", "de"),
    ]
    assert len({problem_id(*part) for part in parts}) == 5
    assert problem_id("ab", "c", "q", "en") != problem_id("a", "bc", "q", "en")


def test_the_split_is_a_pure_function_with_the_wanted_share():
    ids = [str(number) for number in range(4000)]
    test = {identifier for identifier in ids if split_of(identifier, 0.25) == "test"}
    assert len(test) == pytest.approx(1000, abs=110)  # four standard deviations of a binomial count
    # A larger share keeps what a smaller one held out.
    assert test <= {identifier for identifier in ids if split_of(identifier, 0.5) == "test"}
    assert all(split_of(identifier, 0.0) == "train" for identifier in ids)
    assert all(split_of(identifier, 1.0) == "test" for identifier in ids)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("countdwn", "'countdwn'.*'countdown'"),
        ("", "unknown task ''"),
        ("jsonl", "needs its path"),
        ("reasoning_gym:", "needs its name"),
        ("countdown:3", "takes nothing after its name"),
        ("reasoning_gym:chain_summ", "'chain_summ'.*'chain_sum'"),
        ("jsonl:/no/such/file", "/no/such/file: cannot be read"),
    ],
)
def test_unknown_tasks_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        get_task(spec)


def test_unknown_options_are_named():
    with pytest.raises(UserError, match="'number'.*'numbers'"):
        get_task("countdown", number=3)
    with pytest.raises(UserError, match="'max_term'.*'max_terms'"):
        get_task("reasoning_gym:chain_sum", max_term=3)


def test_a_task_tells_the_language_its_words():
    task = get_task("countdown")
    for language in ("en", "de"):
        for _, response in task.worked_examples(language):
            assert consistency(parse(response).think or "", language) == 1.0


# ------------------------------------------------------------------------------------------------------------ countdown


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("3 + 4 * 2", 11, [3, 4, 2]),
        ("(3+4)*2", 14, [3, 4, 2]),
        ("9 - 3 - 2", 4, [9, 3, 2]),
        ("8 / 4 / 2", 1, [8, 4, 2]),
        ("2 - ( 3 - ( 4 ) )", 3, [2, 3, 4]),
        ("6 \u00d7 2 \u00f7 4 \u2212 1", 2, [6, 2, 4, 1]),
        ("12", 12, [12]),
    ],
)
def test_evaluate_by_hand(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 +",
        "+ 3",
        "- 3 + 5",
        "3 4",
        "( 3",
        "3 )",
        "3 / 0",
        "3 / ( 2 - 2 )",
        "3 + 4 = 7",
        "3 ** 2",
        "3 // 2",
        "2 ^ 3",
        "1e3",
        "3.5",
        "x",
        "__import__('os')",
        "1 + " * 40 + "1",
        "(" * 5000 + "1" + ")" * 5000,
        "9" * 5000,
    ],
)
def test_what_is_no_expression(text):
    with pytest.raises(ValueError):
        evaluate(text)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(" ".join), inner.map(lambda text: f"( {text} )")
    ),
    max_leaves=8,
)


@given(expressions)
def test_evaluate_agrees_with_python(text):
    try:
        value, _ = evaluate(text)
    except ValueError:
        assert len(text.split()) > 64
    else:
        # Integers with + - * and parentheses mean the same in Python.
        assert value == eval(text)


@given(st.text(alphabet="0123456789+-*/() .=x\u00d7", max_size=30))
def test_evaluate_raises_nothing_but_value_errors(text):
    with suppress(ValueError):
        evaluate(text)


def countdown_problem(numbers=(3, 5, 7), target=15):
    meta = {"numbers": numbers, "target": target}
    return Problem("p", "countdown", "reasoning", "en", "q", "3 + 5 + 7", meta=meta)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("3 + 5 + 7", True),
        ("7 + ( 5 + 3 )", True),
        ("3 * 5", False),  # 7 is not used
        ("3 * 5 + 7 - 7", False),  # 7 is used twice
        ("8 + 7", False),
        ("15", False),
        ("3 + 5 + 7 = 15", False),
        ("3 + 5 + 7 or 3 * 5", False),
        ("5 + 7 - 3", False),
        ("", False),
    ],
)
def test_countdown_uses_every_number_exactly_once(answer, right):
    assert get_task("countdown").check(countdown_problem(), answer) is right


def test_equal_numbers_are_needed_as_often_as_they_are_given():
    task = get_task("countdown")
    assert task.check(countdown_problem((4, 4, 2), 6), "4 + 4 - 2")
    assert not task.check(countdown_problem((4, 4, 2), 6), "4 + 2")


@pytest.mark.parametrize("operators", ["+-", "+-*/"])
def test_countdown_problems(operators):
    task = get_task("countdown", operators=operators, size=300)
    train, test, harder = (task.problems(split) for split in ("train", "test", "harder"))
    assert train and test and harder
    for problem in (*train, *test, *harder):
        assert task.check(problem, problem.reference)
        assert str(problem.meta["target"]) in problem.question
        assert 1 <= problem.meta["target"] <= 100

    def content(problems):
        return {(tuple(sorted(problem.meta["numbers"])), problem.meta["target"]) for problem in problems}

    assert not content(train) & content(test)
    assert {len(problem.meta["numbers"]) for problem in harder} == {4}
    assert len({problem.id for problem in (*train, *test, *harder)}) == len([*train, *test, *harder])
    assert {problem.language for problem in test} == {"en", "de"}
    again = get_task("countdown", operators=operators, size=300, seed=1)
    assert content(train) != content(again.problems("train"))


def test_countdown_worked_examples_search_and_are_right():
    task = get_task("countdown")
    for language in ("en", "de"):
        by_question = {problem.question: problem for problem in task.problems("train")}
        examples = task.worked_examples(language)
        assert len(examples) == 4
        for question, text in examples:
            response = parse(text)
            assert response.well_formed
            assert task.check(by_question[question], response.answer or "")
            assert (response.think or "").count(" . ") >= 2
    assert task.worked_examples("fr") == []


@pytest.mark.parametrize(
    "options",
    [
        {"numbers": 1},
        {"numbers": 6},
        {"largest": True},
        {"operators": "+%"},
        {"operators": ""},
        {"size": 0},
        {"numbers": "3"},
    ],
)
def test_countdown_refuses_bad_options(options):
    with pytest.raises(UserError, match=f"countdown: {next(iter(options))} must be"):
        get_task("countdown", **options)
