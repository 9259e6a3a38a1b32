"""Prompts as turns, and as the plain text of a tokenizer without a chat template."""

from __future__ import annotations

import pytest

from training import prompts, recipe, responses
from training.errors import UserError
from training.prompts import Turn
from training.tasks.arithmetic import make_problem

PROBLEM = make_problem(4, 3, 20, "en")
EXAMPLES = [("1 + 1 =", "<think> two </think> <answer> 2 </answer>"), ("2 + 2 =", "<answer> 4 </answer>")]
TEMPLATE = "think in <think> </think> then answer in <answer> </answer> ."


def test_a_question_is_one_turn():
    assert prompts.chat(PROBLEM) == [Turn("user", PROBLEM.question)]
    assert prompts.plain(prompts.chat(PROBLEM)) == f"user : {PROBLEM.question} assistant :"


def test_the_template_is_an_instruction_and_examples_are_turns():
    turns = prompts.zero(PROBLEM, EXAMPLES)
    assert turns == [
        Turn("instruction", TEMPLATE),
        Turn("user", EXAMPLES[0][0]),
        Turn("assistant", EXAMPLES[0][1]),
        Turn("user", EXAMPLES[1][0]),
        Turn("assistant", EXAMPLES[1][1]),
        Turn("user", PROBLEM.question),
    ]
    assert prompts.plain(turns) == (
        f"{TEMPLATE} user : 1 + 1 = assistant : <think> two </think> <answer> 2 </answer> "
        f"user : 2 + 2 = assistant : <answer> 4 </answer> user : {PROBLEM.question} assistant :"
    )


def test_the_examples_of_a_recipe_stand_before_the_questions_of_base_and_zero_alone():
    question, response = EXAMPLES[0]
    chosen = recipe.load("smoke", [f"zero.examples=[{{question: '{question}', response: '{response}'}}]"])
    for stage in ("base", "zero"):
        assert responses.prompt_of(stage, chosen)(PROBLEM) == prompts.zero(PROBLEM, EXAMPLES[:1])
    assert responses.prompt_of("sft1", chosen)(PROBLEM) == prompts.chat(PROBLEM)
    assert responses.prompt_of("zero", recipe.load("smoke", []))(PROBLEM) == prompts.zero(PROBLEM)


def test_an_example_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"zero.examples\[0\].*answer"):
        recipe.load("smoke", ["zero.examples=[{question: '1 + 1 =', answer: '2'}]"])


def test_an_unknown_prompt_is_refused_by_name():
    with pytest.raises(UserError, match="unknown prompt 'zeroo': did you mean 'zero'"):
        prompts.style("zeroo")
