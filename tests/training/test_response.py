"""The strict parse: both accepted forms, every exploit with its flag, and properties on arbitrary text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.characters import ALL
from training.response import FLAGS, last_box, parse

RIGHT = "<think> 2 plus 3 makes 5 </think> the sum is <answer> 5 </answer>"

# Text, flags, answer: what each known way around the format leaves behind.
EXPLOITS = {
    "two think blocks": (
        "<think> a </think> <think> b </think> <answer> 5 </answer>",
        ("several_thinks",),
        "5",
    ),
    "text after the answer": (
        "<think> a </think> <answer> 5 </answer> or 6",
        ("text_after",),
        "5",
    ),
    "text after the answer on a later line": (
        "<think>\na\n</think>\n<answer>\n5\n</answer>\n\nor 6",
        ("text_after",),
        "5",
    ),
    "answer only inside the thinking": (
        "<think> a <answer> 5 </answer> </think>",
        ("no_answer", "answer_in_think"),
        None,
    ),
    "answer inside the thinking and outside": (
        "<think> a <answer> 5 </answer> </think> <answer> 6 </answer>",
        ("answer_in_think",),
        "6",
    ),
    "several answers": (
        "<think> a </think> <answer> 5 </answer> <answer> 6 </answer>",
        ("several_answers",),
        None,
    ),
    "empty answer": ("<think> a </think> <answer>   </answer>", ("empty_answer",), None),
    "empty thinking": ("<think> \n </think> <answer> 5 </answer>", ("empty_think",), "5"),
    "closing tag again and again": (
        "<think> a </think> <answer> 5 </answer> </answer> </answer>",
        ("unopened",),
        "5",
    ),
    "answer never closed": (
        "<think> a </think> <answer> 5",
        ("no_answer", "unclosed"),
        None,
    ),
    "thinking never closed": (
        "<think> a <answer> 5 </answer>",
        ("no_answer", "unclosed", "answer_in_think"),
        None,
    ),
    "thinking never opened": ("a </think> <answer> 5 </answer>", ("unopened", "text_before"), "5"),
    "answer before the thinking": ("<answer> 5 </answer> <think> a </think>", ("reversed",), "5"),
    "text before the thinking": ("sure : " + RIGHT, ("text_before",), "5"),
    "thinking in thinking": (
        "<think> a <think> b </think> <answer> 5 </answer>",
        ("nested",),
        None,
    ),
    "answer in answer": (
        "<think> a </think> <answer> 4 <answer> 5 </answer>",
        ("nested",),
        None,
    ),
    "thinking in the answer": (
        "<think> a </think> <answer> <think> b </think> 5 </answer>",
        ("think_in_answer",),
        None,
    ),
    "both forms at once": (
        "<think> a <|special_token|> </think> <answer> 5 </answer>",
        ("mixed_forms",),
        "5",
    ),
    "one form after the other": (
        "<think> a </think> <|special_token|> b <|special_token|> <answer> 5 </answer>",
        ("several_thinks", "mixed_forms"),
        "5",
    ),
    "three special tokens": (
        "<|special_token|> a <|special_token|> b <|special_token|> <answer> 5 </answer>",
        ("no_answer", "unclosed", "answer_in_think"),
        None,
    ),
    "nothing at all": ("", ("no_think", "no_answer"), None),
    "no tags": ("the sum is 5", ("no_think", "no_answer"), None),
    "no answer tags": ("<think> a </think> the sum is 5", ("no_answer",), None),
    "other spellings are text": (
        "<THINK> a </THINK> < answer > 5 </ answer >",
        ("no_think", "no_answer"),
        None,
    ),
}


def test_r1_zero_form():
    response = parse(RIGHT)
    assert response.well_formed and response.flags == ()
    assert (response.think, response.answer) == ("2 plus 3 makes 5", "5")
    assert response.summary == "the sum is 5"
    assert response.text == RIGHT


def test_special_token_form_on_several_lines():
    text = "<|special_token|>\n2 plus 3\nmakes 5\n<|special_token|>\nThe sum:\n<answer>5</answer>\n"
    response = parse(text)
    assert response.well_formed
    assert response.think == "2 plus 3\nmakes 5"
    assert response.answer == "5"
    assert response.summary == "The sum:\n 5"


def test_a_response_without_thinking_has_one_flag():
    assert parse("<answer> hello </answer>").flags == ("no_think",)
    response = parse("nice to see you <answer> hello </answer>")
    assert response.flags == ("no_think",)
    assert (response.think, response.answer, response.summary) == (None, "hello", "nice to see you hello")


@pytest.mark.parametrize("name", EXPLOITS)
def test_exploit(name):
    text, flags, answer = EXPLOITS[name]
    response = parse(text)
    assert not response.well_formed
    assert set(response.flags) == set(flags)
    assert response.answer == answer


def test_every_flag_is_met_by_an_exploit():
    met = {flag for _, flags, _ in EXPLOITS.values() for flag in flags}
    assert met == set(FLAGS)


def test_summary_is_what_follows_the_thinking():
    assert parse("<think> secret </think> all is well <answer> yes </answer>").summary == "all is well yes"
    assert parse("<think> a </think> b <think> secret </think> c").summary == "c"
    assert parse("<think> never closed").summary is None
    assert parse("plain text").summary == "plain text"


def well_formed_by_counting(text: str) -> bool:
    """A second definition, by counting and position instead of walking the tags."""
    text = text.strip()
    special = text.count("<|special_token|>")
    if special == 2:
        opening, closing = "<|special_token|>", "<|special_token|>"
        if "<think>" in text or "</think>" in text:
            return False
    elif special == 0 and text.count("<think>") == text.count("</think>") == 1:
        opening, closing = "<think>", "</think>"
    else:
        return False
    if text.count("<answer>") != 1 or text.count("</answer>") != 1 or not text.startswith(opening):
        return False
    end_of_thinking = text.find(closing, len(opening))
    start_of_answer = text.find("<answer>")
    return (
        len(opening) <= end_of_thinking < start_of_answer
        and bool(text[len(opening) : end_of_thinking].strip())
        and text.endswith("</answer>")
        and bool(text[start_of_answer + len("<answer>") : -len("</answer>")].strip())
    )


pieces = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<|special_token|>",
        " ",
        "\n",
        "5",
        "a b",
        "<",
        "</",
        ">",
    ]
)


@settings(max_examples=500)
@given(st.one_of(st.text(ALL), st.lists(pieces, max_size=12).map("".join)))
def test_parse_never_raises_and_agrees_with_the_second_definition(text):
    response = parse(text)
    assert response.text == text
    assert response.well_formed == well_formed_by_counting(text)
    assert set(response.flags) <= set(FLAGS)
    assert response == parse(text)
    for part in (response.think, response.answer, response.summary):
        assert part is None or (part and part == part.strip())
    for part in (response.think, response.answer):
        assert part is None or part in text


words = st.text(st.characters(blacklist_characters="<>|", blacklist_categories=("Cs",)), min_size=1).filter(
    str.strip
)


@given(think=words, answer=words, between=st.text("abc \n"), special=st.booleans())
def test_what_is_written_is_read(think, answer, between, special):
    opening, closing = ("<|special_token|>",) * 2 if special else ("<think>", "</think>")
    response = parse(f"{opening}{think}{closing}{between}<answer>{answer}</answer>")
    assert response.well_formed
    assert (response.think, response.answer) == (think.strip(), answer.strip())


# ------------------------------------------------------------------------------------------- answers without answer tags

THINK = "<think> we add </think> "


@pytest.mark.parametrize(
    ("response_format", "text", "answer", "flags"),
    [
        # R1's own form: the thinking, then prose with a box or without one.
        ("boxed", THINK + r"The sum is \boxed{72}.", "72", ()),
        ("boxed", THINK + r"First \boxed{71}, no: \boxed{\frac{1}{2}} it is.", r"\frac{1}{2}", ()),
        ("boxed", THINK + "The sum is 72.", None, ("no_answer",)),
        ("boxed", r"<think> \boxed{72} </think> done", None, ("no_answer",)),
        ("boxed", THINK + r"\boxed{}", None, ("empty_answer",)),
        ("boxed", r"\boxed{72}", "72", ("no_think",)),
        ("boxed", r"so <think> a </think> \boxed{72}", "72", ("text_before",)),
        ("boxed", r"<think> a \boxed{72}", None, ("no_answer", "unclosed")),
        ("boxed", r"<think> a </think> <think> b </think> \boxed{72}", "72", ("several_thinks",)),
        ("boxed", r"<|special_token|> a <|special_token|> \boxed{72}", "72", ()),
        ("boxed", THINK + "<answer> 72 </answer>", None, ("no_answer",)),
        ("free", THINK + r"The sum is \boxed{72}.", "72", ()),
        ("free", THINK + "72", "72", ()),
        ("free", THINK + "We add both.\n\n72.", "72", ()),
        ("free", THINK + "The answer is 72.\nI hope that helps.", "72", ()),
        ("free", THINK + "**Answer:** 72", "72", ()),
        ("free", THINK + "The final answer is **72**.", "72", ()),
        ("free", THINK + "The answer is 71. No, the answer is: 72.", "72", ()),
        ("free", THINK + "答案是72", "72", ()),
        ("free", THINK + "<answer> 72 </answer>", "72", ()),
        ("free", THINK, None, ("no_answer",)),
        ("free", "<think> the answer is 72 </think>", None, ("no_answer",)),
        ("free", "72", "72", ("no_think",)),
    ],
)
def test_answers_without_answer_tags(response_format, text, answer, flags):
    response = parse(text, response_format)
    assert (response.answer, response.flags) == (answer, flags)
    assert response.well_formed == (not flags)


@given(st.text(ALL), st.sampled_from(["boxed", "free"]))
def test_other_formats_never_raise_and_are_well_formed_only_with_thinking_and_answer(text, response_format):
    response = parse(text, response_format)
    assert response.well_formed == (not response.flags)
    if response.well_formed:
        assert response.think and response.answer


def test_last_box():
    assert last_box(r"\boxed{1} \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_box("none") is None
    assert last_box(r"\boxed{5") is None
