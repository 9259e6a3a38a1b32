"""Which answers are right: one table by hand, with what people and models really write, and the readers of references."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.characters import ALL
from training import answers
from training.answers import check_of, check_reference, choice_of, chosen, labelled, right, short_answer
from training.tasks.problem import DataError

R, W = True, False

# Reference, answer of the response, whether it is right. Checked by value or by text, as the reference looks.
TABLE = [
    # Plain numbers, decorated.
    ("72", "72", R),
    ("72", "72.", R),
    ("72", " 72 ", R),
    ("72", "72.0", R),
    ("72", "+72", R),
    ("72", "**72**", R),
    ("72", "**72.**", R),
    ("72", "*72*", R),
    ("72", "`72`", R),
    ("72", '"72"', R),
    ("72", "$72$", R),
    ("72", "$$72$$", R),
    ("72", r"\(72\)", R),
    ("72", r"\[72\]", R),
    ("72", r"\(\boxed{72}\)", R),
    ("72", r"\boxed{72}", R),
    ("72", r"\boxed{72.}", R),
    ("72", r"\text{72}", R),
    ("72", r"\boxed{\text{72}}", R),
    ("72", r"\mathbf{72}", R),
    ("72", "(72)", R),
    ("72", "\uff17\uff12", R),
    ("72", "x = 72", R),
    ("72", r"x_1 = 72", R),
    (r"\boxed{72}", "72", R),
    ("$72$", "72", R),
    ("72", "The answer is 72", R),
    ("72", "Answer: **72**.", R),
    ("72", "= 72", R),
    ("72", "The answer is not 72", W),
    ("72", "The answer is 71. The answer is 72.", W),
    ("72", "approximately 72", W),
    ("72", "27", W),
    ("72", "7 2", W),
    ("72", "72 or 73", W),
    ("72", "71, 72", W),
    ("72", "72, 72", W),
    ("72", "not 72", W),
    ("72", "70 + 2", W),
    ("72", "x = 71 = 72", W),
    ("72", r"\boxed{72} , no , \boxed{71}", W),
    ("72", r"\boxed{71} , no , \boxed{72}", R),
    ("72", "-72", W),
    ("72", "72 / 1 / 2", W),
    ("72", "", W),
    # Signs.
    ("-3", "-3", R),
    ("-3", "\u22123", R),
    ("-3", "\u20133", R),
    ("-3", "- 3", R),
    ("\u22123", "-3", R),
    ("-3", "3", W),
    ("3", "\u22123", W),
    # Thousands.
    ("1000", "1,000", R),
    ("1000", "1{,}000", R),
    ("1000", r"1\,000", R),
    ("1000", "1\u202f000", R),
    ("1000", "$1,000$", R),
    ("1{,}000", "1000", R),
    ("12,345,678", "12345678", R),
    ("10 000", "10000", R),
    ("1000", "1 000", R),
    ("1000", "1 00", W),
    ("1000", "1,00", W),
    ("1000", "1.000", W),
    ("1000000", "1,000,000.00", R),
    # Decimals, powers of ten, JSON's spelling.
    ("0.5", ".5", R),
    ("0.5", "0.50", R),
    ("0.50", "0.5", R),
    ("1e-7", "0.0000001", R),
    ("1e-7", "1e-07", R),
    ("1e-07", r"1 \times 10^{-7}", R),
    ("1e-7", r"10^{-7}", W),  # a number is answered by a number
    ("1.5e3", "1500", R),
    ("1500", "1.5e3", R),
    ("1500", "1.5 \u00d7 10^3", R),
    ("1500", r"1.5 \cdot 10^{3}", R),
    ("1500", "1.5 \u00d7 10\u00b3", R),
    ("1e+22", "10000000000000000000000", R),
    ("1e-7", "1e-6", W),
    ("1e-7", "e - 7", W),
    ("5 million", "5,000,000", R),
    ("5 million", "5000", W),
    # Fractions.
    ("1/2", "0.5", R),
    ("1/2", r"\frac{1}{2}", R),
    ("1/2", r"\dfrac{1}{2}", R),
    ("1/2", r"\frac12", R),
    ("1/2", "\u00bd", R),
    ("1/2", "1\u20442", R),
    ("1/2", "2/4", R),
    ("-1/2", r"-\frac{1}{2}", R),
    ("-1/2", r"\frac{-1}{2}", R),
    (r"\frac{1}{2}", "1/2", R),
    (r"\frac{3}{4}", "0.75", R),
    ("3/2", "1 1/2", R),
    ("3/2", r"1\frac{1}{2}", R),
    ("3/2", "1\u00bd", R),
    ("1/2", "2/1", W),
    ("1/3", "0.33", W),
    ("1/2", "1/0", W),
    # Percentages.
    ("50%", "50%", R),
    ("50%", "50 %", R),
    ("50%", r"50\%", R),
    ("50%", "50 percent", R),
    ("50%", "50", R),
    ("50", "50%", R),
    ("50%", "0.5", R),
    ("0.5", "50%", R),
    ("0.5", "0.5%", W),
    ("50%", "0.5%", W),
    ("50", "0.5", W),
    ("50%", "5", W),
    # Money.
    ("18", "$18", R),
    ("18", r"\$18", R),
    ("18", r"\$18.00", R),
    ("18", "18 dollars", R),
    ("$18", "18", R),
    ("$18", "18 dollars", R),
    ("$0.50", "50 cents", R),
    ("$18", "\u20ac18", W),
    ("18 \u20ac", "18 euros", R),
    ("18 \u20ac", "\u20ac18", R),
    ("$18", "18 cents", W),
    ("$-18", "-$18", R),
    # Units: compared where both have one, in the same measure.
    ("5 km", "5 km", R),
    ("5 km", "5", R),
    ("5", "5 km", R),
    ("5 km", "5 m", W),
    ("5 m", "5 km", W),
    ("5 km", "5000 m", R),
    ("5 km", "5 kilometers", R),
    ("5 km", "5 kilometres.", R),
    ("5 km", r"5\text{ km}", R),
    ("5 km", r"5\,\mathrm{km}", R),
    ("5 km", "5km", R),
    ("5 km", "5 kg", W),
    ("3 h", "3 min", W),
    ("3 h", "180 min", R),
    ("3 h", "3 hours", R),
    ("3 h", "3 hrs.", R),
    ("3 hours", "3", R),
    ("2 days", "48 hours", R),
    ("1 year", "12 months", R),
    ("60 km/h", "60 km/h", R),
    ("60 km/h", "60 km per hour", R),
    ("60 km/h", "60 m/s", W),
    ("36 km/h", "10 m/s", R),
    ("60 km/h", "60 km", W),
    ("5 km/h", "5 kph", R),
    ("20\u00b0C", "20 degrees Celsius", R),
    ("20\u00b0C", "20\u00b0F", W),
    ("12 cm^2", "12 cm\u00b2", R),
    ("12 cm^2", "12 square centimeters", R),
    ("12 cm^2", "12 cm", W),
    ("12 cm^2", "12 cm^3", W),
    ("1 m^2", "10000 cm^2", R),
    ("2 l", "2000 ml", R),
    ("90\u00b0", "90", R),
    ("90\u00b0", r"90^\circ", R),
    ("90^{\\circ}", "90 degrees", R),
    ("90\u00b0", "90%", W),
    ("8 apples", "8 apples", R),
    ("8 apples", "8", R),
    ("8", "8 apples", R),
    ("8 apples", "8 apple", R),
    ("8 apples", "8 pears", W),
    ("8", "8\u4e2a", R),
    ("8\u4e2a", "8", R),
    ("8", "9\u4e2a", W),
    ("8 apples", "9 apples", W),
    ("8", "8 and 9", W),
    ("8", "8 or more", W),
    ("8", "8 apples and 9 pears", W),
    # Algebra, roots, constants.
    ("5!", "120", R),
    ("5!", "5", W),
    ("x+1", "1+x", R),
    ("x+1", "y = 1 + x", R),
    ("x+1", "x+2", W),
    ("x^2+x", "x(x+1)", R),
    ("x^2", "x\u00b2", R),
    (r"x^2-1", "(x-1)(x+1)", R),
    (r"\sqrt{8}", r"2\sqrt{2}", R),
    (r"\sqrt{8}", "sqrt(8)", R),
    (r"\sqrt{8}", "2*sqrt(2)", R),
    (r"\sqrt{8}", "\u221a8", R),
    (r"\sqrt{8}", "8", W),
    (r"2\pi", "2\u03c0", R),
    (r"2\pi", "2 pi", R),
    (r"2\pi", "2*pi", R),
    (r"2\pi", "6", W),
    (r"\frac{\pi}{4}", "pi/4", R),
    (r"\infty", "\u221e", R),
    (r"\infty", r"-\infty", W),
    ("3+2i", "2i+3", R),
    ("3+2i", "3-2i", W),
    (r"\sqrt{2}", r"\sqrt{2} \vee \sqrt{3}", W),
    # Points, intervals, sets, equations.
    ("(1, 2)", "(1,2)", R),
    ("(1, 2)", r"\left(1, 2\right)", R),
    ("(1, 2)", "(2, 1)", W),
    ("(1, 2)", "(1, 2, 3)", W),
    ("[0, 1)", "[0,1)", R),
    ("[0, 1)", r"\left[0, 1\right)", R),
    ("[0, 1)", "[0, 1]", W),
    ("[0, 1)", "(0, 1)", W),
    (r"(-\infty, 2] \cup [3, \infty)", r"(-\infty,2]\cup[3,\infty)", R),
    (r"(-\infty, 2] \cup [3, \infty)", "(-\u221e, 2] \u222a [3, \u221e)", R),
    (r"(-\infty, 2] \cup [3, \infty)", r"(-\infty, 2]", W),
    (r"\{1, 2\}", r"\{2, 1\}", R),
    (r"\{1, 2\}", "{1, 2}", R),
    (r"\{1, 2\}", r"\{1\}", W),
    (r"\{1, 2\}", r"\{1, 2, 3\}", W),
    ("1, 2, 3", "1,2,3", R),
    ("1, 2, 3", "1, 2", W),
    ("x = 2y", "x = 2y", R),
    ("x = 2y", "x = 3y", W),
    ("3:4", "3:4", R),
    ("3:4", "4:3", W),
    (r"\pm 2", "\u00b12", R),
    # Texts.
    ("Paris", "paris", R),
    ("Paris", "Paris.", R),
    ("Paris", "**Paris**", R),
    ("Paris", r"\text{Paris}", R),
    ("Paris", r"\boxed{\text{Paris}}", R),
    ("Paris", '"Paris"', R),
    ("New  York", "new york", R),
    ("Paris", "London", W),
    ("Paris", "Paris or London", W),
    ("Paris", "not Paris", W),
    ("yes", "Yes!", R),
    ("yes", "no", W),
    ("vitamin B12", "Vitamin B12", R),
    ("vitamin B12", "12", W),
    # A letter whose choices stand in the question.
    ("B", "B", R),
    ("B", "(B)", R),
    ("B", "B.", R),
    ("B", "b", R),
    ("B", r"\boxed{B}", R),
    ("B", r"\text{(B)}", R),
    ("B", "**B**", R),
    ("B", "B) Paris", R),
    ("B", "B. Paris", R),
    ("B", "The answer is B.", R),
    ("B", "A", W),
    ("B", "A or B", W),
    ("B", "B or C", W),
    ("B", "Berlin", W),
]  # fmt: skip


def test_the_table_is_long():
    assert len(TABLE) >= 150 and len({(reference, answer) for reference, answer, _ in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("reference", "answer", "expected"), TABLE)
def test_right_or_wrong(reference, answer, expected):
    check = check_of(reference, {})
    check_reference(check, reference)
    assert right(check, reference, answer) is expected


@pytest.mark.parametrize(
    ("language", "reference", "answer", "expected"),
    [
        ("de", "3,5", "3.5", R),
        ("de", "3,5", "3,50", R),
        ("de", "3.5", "3,5", R),
        ("de", "3,5", "x = 3,5", R),
        ("de", "3,5", r"\boxed{3{,}5}", R),
        ("de-AT", "3,5 Liter", "3,5 l", R),
        ("de", "3,5", "35", W),
        ("de", "3,5", "3", W),
        ("de", "3,5", "5", W),
        ("de", "1234", "1.234", R),
        ("de", "1.234", "1234", R),
        ("de", "1.234,5 km", "1234500 m", R),
        ("de", "12", "1,2", W),
        ("de", "0.125", "0,125", R),
        ("fr", "1 234,5", "1234.5", R),
        ("de", "50 %", "0,5", R),
        ("de", "(3,5)", "(3, 5)", R),
        ("de", "(3,5)", "3.5", W),
        ("en", "3.5", "3,5", W),
        ("en", "1,234", "1234", R),
        ("zh-CN", "3.5", "3,5", W),
    ],
)
def test_a_comma_is_a_point_in_languages_that_write_it_so(language, reference, answer, expected):
    check = check_of(reference, {}, language)
    check_reference(check, reference, language=language)
    assert right(check, reference, answer, language=language) is expected


CHOICES = {"A": "4 km", "B": "5 km", "C": "Paris", "D": "a cat"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B)", "B"),
        (r"\boxed{B}", "B"),
        (r"\text{(B)}", "B"),
        ("**B**", "B"),
        ("Option B", "B"),
        ("B) 5 km", "B"),
        ("B. 5 km", "B"),
        ("B: 5 km.", "B"),
        ("(C) Paris", "C"),
        ("5 km", "B"),
        ("5000 m", "B"),
        ("paris", "C"),
        ("a cat", "D"),
        ("B) 4 km", None),
        ("A or B", None),
        ("A, B", None),
        ("E", None),
        ("6 km", None),
        ("cat", None),
        ("", None),
    ],
)
def test_a_choice_by_label_or_text(answer, expected):
    assert choice_of(answer, CHOICES) == expected
    assert right("choice", "B", answer, CHOICES) is (expected == "B")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("C", "C"), ("(c)", "C"), (2, "C"), (0, "A"), ("Paris", "C"), ("The answer is C.", "C")],
)
def test_the_right_choice_by_letter_index_or_text(answer, expected):
    assert chosen(answer, CHOICES) == expected


@pytest.mark.parametrize("answer", ["E", 4, -1, True, "London", None, "1"])
def test_a_right_choice_that_is_none_is_named(answer):
    with pytest.raises(DataError, match="is none of the choices A, B, C, D"):
        chosen(answer, CHOICES)


def test_labels_of_choices():
    assert labelled(["x", 5]) == {"A": "x", "B": "5"}
    assert labelled({"text": ["x", "y"], "label": ["1", "2"]}) == {"1": "x", "2": "y"}
    assert choice_of("(2)", {"1": "x", "2": "y"}) == "2"
    for bad in ("x", ["x"], {"A": "x"}, list(range(30)), {"text": ["x", "y"], "label": ["A", "A"]}):
        with pytest.raises(ValueError, match="field 'choices'"):
            labelled(bad)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 72 in all.\n#### 72", "72"),
        ("#### 1,000", "1,000"),
        ("We solve it. The answer is \\boxed{5}.", "5"),
        (r"First \boxed{3}, in the end $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("The answer is 42.", "42"),
        ("Long talk.\nAnswer: (B)", "(B)"),
        ("72", "72"),
        (" New York ", "New York"),
    ],
)
def test_references_of_public_data_sets_are_read(written, expected):
    assert short_answer(written) == expected
    check = check_of(expected, {})
    check_reference(check, expected)
    assert right(check, short_answer(written), expected)


@pytest.mark.parametrize(
    ("check", "reference", "message"),
    [
        ("text", "First we add.\nThen we are done.", "no response can equal this answer of 31 characters"),
        ("text", "word " * 50, "no response can equal"),
        ("mathematics", "zzz ???", "cannot be parsed"),
        ("mathematics", "x+1 ; " + "x+" * 600 + "1", "no response can match|cannot be parsed"),
        ("choice", "E", "its own check"),
    ],
)
def test_a_reference_that_no_response_can_match_is_named(check, reference, message):
    with pytest.raises(DataError, match=message):
        check_reference(check, reference, CHOICES)


def test_a_reference_is_parsed_once(monkeypatch):
    parsed = []
    parse = answers.mathematics._parse
    monkeypatch.setattr(answers.mathematics, "_parse", lambda text: parsed.append(text) or parse(text))
    reference = r"\sqrt{7}+\sqrt{19}"
    for _ in range(3):
        check_reference("mathematics", reference)
        assert not right("mathematics", reference, "1")
    assert parsed.count(reference) == 1


@given(st.text(ALL, max_size=60), st.sampled_from(["5 km", "Paris", "B", "50%"]))
def test_any_answer_is_judged_without_an_error(answer, reference):
    assert right(check_of(reference, {}), reference, answer) in (True, False)
    assert choice_of(answer, CHOICES) in (None, *CHOICES)


@pytest.mark.parametrize(
    "answer",
    [
        "5 " + "a" * 90 + "!",
        "1," * 49,
        "5 " + "a " * 45 + "!",
        r"\text{" * 5000,
        "*" * 10_000,
        "$" * 9999,
        "answer is " * 900,
    ],
)
def test_an_answer_made_to_keep_the_check_busy_does_not(answer):
    # a pattern that tries every way to split such a text would not come back
    assert not right("mathematics", "6", answer) and not right("text", "Paris", answer)
    assert choice_of(answer, CHOICES) is None
