"""Equality of mathematical answers, the ways to cheat it, and its use from threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.characters import ALL
from training import mathematics
from training.errors import UserError
from training.mathematics import check_reference, equal, looks_mathematical
from training.tasks.problem import DataError


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("5", "5", True),
        ("5", "5.0", True),
        ("5", "x = 5", True),
        ("1000", "1,000", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\boxed{5}", "5", True),
        ("5", "6", False),
        ("5", "", False),
        # A guess of several values.
        ("5", "3 or 5", False),
        ("5", "5 or 3", False),
        ("5", "3, 5", False),
        ("5", "3 5", False),
        ("8", "3 5", False),
        ("5", "3 = 5", False),
        ("5", "x = 3 = 5", False),
        ("5", r"3 \vee 5", False),
        ("5", "3\n5", False),
        ("5", "[1, 9]", False),
        # The question said again.
        ("5", "2+3", False),
        # The last box counts.
        ("5", r"\boxed{3} , no , \boxed{5}", True),
        ("5", r"\boxed{5} , no , \boxed{3}", False),
        ("5", r"\boxed{5", False),
        # Symbolic equality.
        ("x+1", "1+x", True),
        ("x+1", "y = 1 + x", True),
        ("x+1", "x+2", False),
        ("x+1", "x+1, x", False),
        ("x+1", r"x+1 \text{ or } x", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\sqrt{2}", r"\sqrt{2} \vee \sqrt{3}", False),
        (r"\sqrt{2}", r"\sqrt{3} \vee \sqrt{2}", False),
        (r"\sqrt{2}", r"\sqrt{3} = \sqrt{2}", False),
        (r"\sqrt{2}", "x" * 2000, False),
        ("(1, 2)", "(1,2)", True),
        ("(1, 2)", "(2,1)", False),
        ("x = 2y", "x = 2y", True),
    ],
)
def test_equal(reference, answer, expected):
    assert equal(reference, answer) is expected


@pytest.mark.parametrize("reference", ["zzz ???", "", r"\frac{", "$$"])
def test_a_reference_that_cannot_be_parsed_is_an_error_of_the_data(reference):
    with pytest.raises(DataError, match="cannot be parsed"):
        check_reference(reference)
    # Whatever the answer, even the reference itself: never a reward.
    for answer in (reference, "5", ""):
        with pytest.raises(DataError, match="cannot be parsed"):
            equal(reference, answer)


def test_symbolic_equality_in_threads():
    pairs = [
        ("x+1", "1+x", True),
        ("x+1", "x+2", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("5", "5", True),
    ] * 5
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: equal(pair[0], pair[1]), pairs))
    assert found == [expected for _, _, expected in pairs]


def test_plain_numbers_need_no_package(monkeypatch):
    monkeypatch.setattr(mathematics, "find_spec", lambda name: None)
    check_reference("5")
    assert equal("5", "5.0")
    with pytest.raises(UserError, match="pip install math-verify"):
        check_reference("y+17")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", True),
        ("x+1=2", True),
        (r"\pi", True),
        ("Paris", False),
        ("vitamin B12", False),
        ("yes", False),
        ("", False),
    ],
)
def test_looks_mathematical(text, expected):
    assert looks_mathematical(text) is expected


@given(st.text(ALL, max_size=50))
def test_any_answer_to_a_number_is_judged_without_an_error(answer):
    assert equal("5", answer) in (True, False)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_integers_are_equal_as_integers(wanted, given_number):
    assert equal(str(wanted), str(given_number)) is (wanted == given_number)
