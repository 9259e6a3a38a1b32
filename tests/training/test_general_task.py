"""The general task: facts, splits, the documents of the base corpus, and what the oracle says about them."""

import numpy as np

from training import preferences, prompts, rewards
from training.response import parse
from training.tasks import get_task
from training.tasks.general import corpus_document, reference_response
from training.tasks.general_facts import FAMILIES
from training.tokenizer import build_tokenizer

TASK = get_task("general")
TRAIN, TEST = TASK.problems("train"), TASK.problems("test")


def sample_of(problem, text):
    return rewards.Sample(problem, text, parse(text), ())


def test_splits_share_no_question_and_no_combination_of_phrasing_and_subject():
    assert not {p.question for p in TRAIN} & {p.question for p in TEST}
    wrapped = ("please ", "hello ", "bitte ", "hallo ")

    def core(question):
        for word in wrapped:
            question = question.removeprefix(word).removesuffix(" please").removesuffix(" bitte")
        return question

    tables = {"capital", "colour", "translation", "writing", "secret"}
    assert not {core(p.question) for p in TRAIN if p.level in tables} & {
        core(p.question) for p in TEST if p.level in tables
    }


def test_every_family_has_problems_in_both_splits_and_ids_are_unique():
    families = {(family.name, family.language) for family in FAMILIES}
    for split in (TRAIN, TEST):
        assert {(p.level, p.language) for p in split} == families
    everything = [*TRAIN, *TEST]
    assert len({p.id for p in everything}) == len(everything)
    assert 0.15 < len(TEST) / len(everything) < 0.25
    assert list(TASK.problems("harder")) == []


def test_known_facts_are_the_references():
    facts = {p.question: p.reference for p in (*TRAIN, *TEST)}
    assert facts["name the capital of norway"] == "oslo"
    assert facts["welche farbe hat schnee"] == "weiß"
    assert facts["translate coal to german"] == "kohle"
    assert facts["übersetze kohle auf englisch"] == "coal"
    assert facts["who are you"] == "mini"


def test_every_reference_response_is_good_by_oracle_format_and_language():
    for problem in (*TRAIN, *TEST):
        text = reference_response(problem)
        sample = sample_of(problem, text)
        assert preferences.oracle(problem, sample.response), text
        assert rewards.format(sample).value == 1.0, text
        assert rewards.language_consistency(sample).value == 1.0, text
        assert ("<|special_token|>" in text) == problem.thinking
        assert TASK.check(problem, sample.response.answer)


def test_only_greetings_need_no_thinking():
    assert {p.level for p in (*TRAIN, *TEST) if not p.thinking} == {"greeting"}


def test_corpus_documents_use_training_questions_and_survive_the_tokenizer():
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(0)
    asked = {p.question for p in TRAIN}
    for _ in range(500):
        text = corpus_document(rng).text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        assert text.split("user : ")[1].split(" assistant :")[0] in asked


def test_the_corpus_holds_good_behaviour_as_a_minority():
    rng = np.random.default_rng(1)
    by_question = {p.question: p for p in TRAIN}
    found = {"helpful": [], "unsafe": []}
    unsafe_in_thinking_only = 0
    for _ in range(3000):
        question, text = corpus_document(rng).text.split("user : ")[1].split(" assistant : ", 1)
        problem, response = by_question[question], parse(text)
        good = preferences.oracle(problem, response) and rewards.format(sample_of(problem, text)).value == 1.0
        found[problem.kind].append(good)
        if problem.kind == "unsafe" and response.summary and problem.reference not in response.summary:
            unsafe_in_thinking_only += problem.reference in text
    assert 0.2 < np.mean(found["helpful"]) < 0.5
    assert 0.15 < np.mean(found["unsafe"]) < 0.35
    assert unsafe_in_thinking_only > 20  # a safety model that read the summary alone would miss these


def test_worked_examples_show_every_family_of_the_language_in_the_special_token_form():
    for language in ("en", "de"):
        examples = TASK.worked_examples(language)
        assert len(examples) == len([family for family in FAMILIES if family.language == language])
        trained = {p.question for p in TRAIN if p.language == language}
        assert all(question in trained for question, _ in examples)


def test_judge_prompt_is_in_the_vocabulary():
    tokenizer = build_tokenizer()
    text = prompts.plain(prompts.judge(TRAIN[0], "57", "<answer> 58 </answer>"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
