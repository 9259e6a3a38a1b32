"""Each filter rejects what it is for and keeps what is fine; `apply` counts and shows it."""

import pytest

from training import filters
from training.errors import UserError
from training.filters import FILTERS, Settings, apply
from training.response import parse
from training.rewards import Sample
from training.tasks.problem import Problem

GOOD = "<think> we check the sum </think> the sum is <answer> 5 </answer>"


class Exact:
    name = "exact"

    def problems(self, split):
        return []

    def check(self, problem, answer):
        if answer == "boom":
            raise ValueError("cannot read it")
        return answer == problem.reference

    def worked_examples(self, language):
        return []


def sample(
    text=GOOD,
    *,
    ids=tuple(range(30)),
    finished=True,
    language="en",
    thinking=True,
    sample_id=0,
    identifier="p",
):
    problem = Problem(identifier, "exact", "reasoning", language, "what is 2 plus 3", "5", thinking=thinking)
    return Sample(problem, text, parse(text), tuple(ids), sample_id, finished)


def reject(name, one, **settings):
    return FILTERS[name](one, Settings(task=Exact(), **settings))


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "wrong_by_judge"])
def test_a_good_response_passes(name):
    assert reject(name, sample()) is None


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("unfinished", sample(finished=False), "token limit"),
        ("bad_format", sample(GOOD + " more"), "text_after"),
        ("bad_format", sample("<answer> 5 </answer>"), "no_think"),
        ("code_block", sample("<think> ``` x = 5 ``` </think> <answer> 5 </answer>"), "code block"),
        ("repetition", sample(ids=(1, 2, 3, 4) * 3), "4 tokens stands 3 times"),
        ("repetition", sample(ids=(9,) * 12), "1 tokens stands 3 times"),
        (
            "mixed_language",
            sample("<think> we check wir </think> <answer> 5 </answer>"),
            "67% of the words of the thinking",
        ),
        (
            "mixed_language",
            sample("<think> we check </think> die summe <answer> 5 </answer>"),
            "0% of the words of the summary",
        ),
        ("wrong_by_rule", sample("<think> a </think> <answer> 6 </answer>"), "'6' is not '5'"),
        ("wrong_by_rule", sample("<think> 5 </think>"), "no single answer"),
        (
            "wrong_by_rule",
            sample("<think> a </think> <answer> boom </answer>"),
            "error: ValueError: cannot read it",
        ),
    ],
)
def test_a_bad_response_is_rejected(name, bad, reason):
    assert reason in reject(name, bad)


def test_trivial_prompts_need_no_thinking():
    assert reject("bad_format", sample("hello <answer> hello </answer>", thinking=False)) is None


def test_words_that_no_list_knows_are_no_mix():
    assert reject("mixed_language", sample("<think> we check </think> <answer> Qwxland </answer>")) is None
    assert reject("mixed_language", sample("<think> 2 + 3 = 5 </think> <answer> 5 </answer>")) is None


def test_the_share_of_foreign_words_is_a_setting():
    nine_of_ten = sample("<think> " + "we " * 9 + "wir </think> <answer> 5 </answer>")
    assert reject("mixed_language", nine_of_ten, min_consistency=0.9) is None
    assert reject("mixed_language", nine_of_ten, min_consistency=0.91) is not None


def test_paragraphs_end_at_blank_lines():
    words = "word " * 20
    assert reject("overlong_paragraph", sample(f"{words}\n\n{words}"), paragraph_words=20) is None
    assert (
        reject("overlong_paragraph", sample(f"{words}\n{words}"), paragraph_words=20)
        == "a paragraph of 40 words"
    )
    # Chinese has no spaces: each of the 30 characters counts, and so does the number.
    assert (
        reject(
            "overlong_paragraph", sample("先加个位再加十位" * 3 + "得到结果为 5 。 好"), paragraph_words=25
        )
        is not None
    )


def test_repetition_needs_a_loop():
    assert reject("repetition", sample(ids=())) is None
    assert reject("repetition", sample(ids=(7,) * 11)) is None  # three sevens or "1 1 1" are no loop yet
    assert reject("repetition", sample(ids=(1, 2, 3, 4) * 2)) is None
    assert reject("repetition", sample(ids=(1, 2, 3, 4) * 2 + (1, 2, 3, 5))) is None
    loop_in_the_middle = (*range(100, 120), *(1, 2, 3, 4, 5) * 3, *range(200, 210))
    assert reject("repetition", sample(ids=loop_in_the_middle)) is not None
    assert reject("repetition", sample(ids=loop_in_the_middle), loop_repeats=4) is None


def test_the_judges_verdict():
    asked = {("p", 0): True, ("p", 1): False, ("p", 2): None}
    assert reject("wrong_by_judge", sample(sample_id=0), verdicts=asked) is None
    assert reject("wrong_by_judge", sample(sample_id=1), verdicts=asked) == "the judge says wrong"
    assert reject("wrong_by_judge", sample(sample_id=2), verdicts=asked) == "the verdict cannot be read"
    assert reject("wrong_by_judge", sample(sample_id=3), verdicts=asked) == "the judge was not asked"


def test_apply_keeps_counts_and_shows():
    wrong = [sample(f"<think> we check {n} </think> <answer> 6 </answer>") for n in range(5)]
    wrong_and_cut = sample("<think> we check </think> <answer> 7 </answer>", finished=False)
    other_problem = sample(identifier="q")
    samples = [sample(), *wrong, wrong_and_cut, sample(), other_problem]
    names = ["wrong_by_rule", "unfinished", "duplicate", "code_block"]
    kept, rejections, examples = apply(samples, names, Settings(task=Exact()), examples=2)
    assert kept == [samples[0], other_problem]
    assert list(rejections.items()) == [
        ("wrong_by_rule", 6),
        ("unfinished", 1),
        ("duplicate", 1),
        ("code_block", 0),
    ]
    assert [one for one, _ in examples["wrong_by_rule"]] == wrong[:2]
    assert examples["unfinished"] == [(wrong_and_cut, "cut at the token limit")]
    assert examples["code_block"] == []


def test_a_rejected_response_makes_no_duplicate():
    kept, rejections, _ = apply([sample(finished=False), sample()], ["unfinished", "duplicate"], Settings())
    assert len(kept) == 1 and rejections["duplicate"] == 0


def test_unknown_filters_and_missing_tasks_name_themselves():
    with pytest.raises(UserError, match="'repetitions'.*'repetition'"):
        apply([], ["repetitions"], Settings())
    with pytest.raises(UserError, match="wrong_by_rule"):
        filters.wrong_by_rule(sample(), Settings())
