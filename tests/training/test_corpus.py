"""Arithmetic problems and the pretraining corpus: splits, worked examples, and that every fault is really in it."""

import re

import numpy as np
import pytest

from training import corpus, prompts
from training.errors import UserError
from training.language import consistency
from training.response import parse
from training.sections import Base
from training.tasks import arithmetic, get_task
from training.tokenizer import build_tokenizer

TASK = get_task("arithmetic")
MIX = Base().corpus


def draw(kind, count=300):
    rng = np.random.default_rng(0)
    drawn = [arithmetic.corpus_document(rng, kind) for _ in range(count)]
    return [(problem, text, parse(text)) for problem, text in drawn]


def share_right(drawn):
    return np.mean([response.answer == problem.reference for problem, _, response in drawn])


def test_a_worked_example_by_hand():
    # 12 is under 30; 12 + 7 = 19 and 26 are, too; 33 is over it.
    problem = arithmetic.make_problem(12, 7, 30, "en")
    assert problem.question == "from 12 by 7 what is first over 30 ?" and problem.level == "3 steps"
    assert arithmetic.tidy(problem) == (
        "12 under 30 plus 7 makes 19 under 30 plus 7 makes 26 under 30 plus 7 makes 33 over 30 .",
        "33",
    )
    german = arithmetic.make_problem(58, 9, 60, "de")
    assert german.question == "von 58 um 9 was ist zuerst über 60 ?" and german.level == "1 step"
    assert arithmetic.tidy(german) == ("58 unter 60 und 9 gibt 67 über 60 .", "67")


@pytest.mark.parametrize("split", ["train", "test", "harder", "hardest"])
def test_the_answer_is_the_first_number_over_the_limit_and_none_on_the_way_is_the_limit(split):
    for problem in TASK.problems(split):
        start, by, limit = (problem.meta[name] for name in ("start", "by", "limit"))
        way = range(start, limit + by + 1, by)
        assert limit not in way
        assert int(problem.reference) == next(number for number in way if number > limit)
        assert arithmetic.tidy(problem)[1] == problem.reference
        assert problem.level.split()[0] == str(
            arithmetic.tidy(problem)[0].count("plus" if problem.language == "en" else "und")
        )


def test_splits_share_no_problem_and_no_rest_of_one_at_any_level_or_in_any_language():
    splits = {name: TASK.problems(name) for name in ("train", "test", "harder", "hardest")}
    ends = {
        name: {(p.meta["by"], p.meta["limit"], p.reference) for p in split} for name, split in splits.items()
    }
    for name in ("test", "harder", "hardest"):
        assert not ends["train"] & ends[name]
    ids = [p.id for split in splits.values() for p in split]
    assert len(set(ids)) == len(ids)
    assert len(splits["test"]) >= 1024  # as many as the marks need
    assert {p.language for p in splits["test"]} == set(arithmetic.LANGUAGES)


def test_the_levels_go_from_what_the_corpus_shows_to_what_no_stage_trains_on():
    def levels(problems):
        return {int(p.level.split()[0]) for p in problems}

    shown = {1, 2, 3, 4}
    assert levels(TASK.problems("test")) == shown
    assert levels(p for kind in arithmetic.DOCUMENT_KINDS for p, _, _ in draw(kind)) == shown
    assert levels(TASK.problems("harder")) == {5, 6}
    assert levels(TASK.problems("train")) == shown | {5, 6}
    assert levels(TASK.problems("hardest")) == {7, 8}


def test_no_text_of_the_corpus_has_more_steps_than_its_problem_asks_for():
    def chains(text):
        return re.split(r"[.?:]", text)

    for kind in set(arithmetic.DOCUMENT_KINDS) - {"repetition"}:  # which says one step again and again
        for problem, text, _ in draw(kind):
            steps = max(len(re.findall("makes|gibt", chain)) for chain in chains(text))
            assert steps <= int(problem.level.split()[0]) <= 4


def test_series_are_right_steps_without_a_question_or_an_answer():
    for problem, text, _ in draw("series"):
        numbers = [problem.meta["start"], *map(int, re.findall(r"(?:makes|gibt) (\d+)", text))]
        assert numbers == list(range(numbers[0], int(problem.reference) + 1, problem.meta["by"]))
    assert all(
        "?" not in d.text and "answer" not in d.text for d in corpus.documents(0, 50, mix={"series": 1})
    )


def test_the_corpus_asks_training_problems_only():
    test = {p.question for p in TASK.problems("test")}
    asked = {q for d in corpus.documents(0, 3000, mix=MIX) for q in re.findall(r"user : (.*?\?)", d.text)}
    assert asked and not asked & test


def test_check_takes_the_number_and_nothing_else():
    problem = arithmetic.make_problem(12, 7, 30, "en")
    assert TASK.check(problem, "33") and TASK.check(problem, " 33 ")
    for answer in ("34", "3 3", "33 34", "the number 33", "033", ""):
        assert not TASK.check(problem, answer)


@pytest.mark.parametrize("language", arithmetic.LANGUAGES)
def test_worked_examples_are_well_formed_right_and_in_one_language(language):
    by_question = {p.question: p for p in TASK.problems("train")}
    examples = TASK.worked_examples(language)
    assert len(examples) >= 2
    for question, text in examples:
        response = parse(text)
        assert response.well_formed and TASK.check(by_question[question], response.answer)
        assert consistency(response.think, language) == 1.0
        assert consistency(response.summary, language) == 1.0


def test_tidy_documents_are_what_the_pipeline_wants():
    for problem, _, response in draw("tidy"):
        assert response.well_formed and response.answer == problem.reference
        assert consistency(response.think, problem.language) == 1.0


def test_mixed_documents_are_right_but_in_two_languages():
    drawn = draw("mixed")
    assert share_right(drawn) == 1.0
    assert 0.4 < np.mean([consistency(r.think, p.language) for p, _, r in drawn]) < 0.7


def test_sloppy_and_hasty_documents_are_mostly_wrong():
    assert share_right(draw("sloppy")) < 0.4
    assert share_right(draw("hasty")) < 0.2


def test_hasty_documents_have_no_steps_and_most_often_answer_the_limit():
    drawn = draw("hasty")
    assert not any(re.search("makes|gibt", text) for _, text, _ in drawn)
    answered = [(p, r) for p, _, r in drawn if r.answer is not None]
    assert np.mean([r.answer == str(p.meta["limit"]) for p, r in answered]) > 0.5


def test_formless_documents_have_many_different_faults():
    drawn = draw("formless")
    assert not any(response.well_formed for _, _, response in drawn)
    flags = {flag for _, _, response in drawn for flag in response.flags}
    assert flags == {"no_answer", "answer_in_think", "no_think", "unclosed"}


def test_code_overlong_and_repetition_are_there():
    assert all("```" in text for _, text, _ in draw("code"))
    tidy_length = np.mean([len(text.split()) for _, text, _ in draw("tidy")])
    assert np.mean([len(text.split()) for _, text, _ in draw("overlong")]) > 2 * tidy_length
    for _, text, _ in draw("repetition"):
        _, first, *steps = re.split(" (?=under|unter)", text)
        assert len(steps) >= 4 and set(steps) == {first}


def test_reflect_documents_check_their_steps():
    for problem, text, response in draw("reflect"):
        assert response.well_formed
        assert {"en": "check :", "de": "prüfe :"}[problem.language] in text


def test_few_shot_documents_end_in_the_special_token_form():
    documents = corpus.documents(0, 50, mix={"few_shot": 1.0})
    for document in documents:
        assert document.text.count("user :") == corpus.SHOTS + 1
        assert parse(document.text.rsplit("assistant : ", 1)[1]).well_formed


def test_good_documents_are_a_minority_of_the_default_mix():
    assert MIX["tidy"] < 0.1 and sum(MIX.values()) == pytest.approx(1.0)


def test_all_words_are_in_the_vocabulary_and_documents_fit():
    tokenizer = build_tokenizer()
    for document in corpus.documents(1, 2000, mix=MIX):
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == document.text, document.text
        assert len(ids) + 2 <= Base().max_length


def test_documents_depend_on_the_seed_alone():
    assert corpus.documents(3, 50, mix=MIX) == corpus.documents(3, 50, mix=MIX)
    assert corpus.documents(3, 50, mix=MIX) != corpus.documents(4, 50, mix=MIX)


def test_prompts_use_known_words_only():
    tokenizer = build_tokenizer()
    problem = arithmetic.make_problem(12, 7, 34, "de")
    written = (
        prompts.zero(problem),
        prompts.chat(problem),
        prompts.reflect(problem),
        prompts.few_shot(problem, TASK.worked_examples("de")[:2]),
        prompts.judge(problem, "40", "<answer> 46 </answer>"),
    )
    for text in map(prompts.plain, written):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    "mix",
    [{"tidy": -1.0}, {"tidy": 0.0}, {}, {"unheard_of": 1.0}],
    ids=["negative", "zero", "empty", "unknown"],
)
def test_bad_shares_are_named(mix):
    with pytest.raises(UserError, match=r"base\.corpus"):
        corpus.documents(0, 3, mix=mix)


@pytest.mark.parametrize("option", ["steps", "largest"])
def test_bad_options_are_named(option):
    with pytest.raises(UserError, match=f"{option} must be an integer from .*, got 0"):
        get_task("arithmetic", **{option: 0})
