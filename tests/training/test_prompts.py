"""Prompts as texts and as the turns of a chat template."""

from __future__ import annotations

import pytest

from training import prompts, recipe, responses
from training.errors import UserError
from training.tasks.arithmetic import make_problem

PROBLEM = make_problem(4, 3, "en")
EXAMPLES = [("1 + 1 =", "<think> two </think> <answer> 2 </answer>"), ("2 + 2 =", "<answer> 4 </answer>")]
TEMPLATE = "think in <think> </think> then answer in <answer> </answer> . "


def test_a_question_is_one_turn():
    assert prompts.turns(prompts.chat(PROBLEM)) == [{"role": "user", "content": PROBLEM.question}]
    odd = prompts.ask("who is a user : nobody knows")
    assert prompts.turns(odd) == [{"role": "user", "content": "who is a user : nobody knows"}]


def test_the_template_stands_in_the_first_turn_and_examples_are_turns():
    assert prompts.turns(prompts.zero(PROBLEM)) == [{"role": "user", "content": TEMPLATE + PROBLEM.question}]
    assert prompts.turns(prompts.zero(PROBLEM, EXAMPLES)) == [
        {"role": "user", "content": TEMPLATE + EXAMPLES[0][0]},
        {"role": "assistant", "content": EXAMPLES[0][1]},
        {"role": "user", "content": EXAMPLES[1][0]},
        {"role": "assistant", "content": EXAMPLES[1][1]},
        {"role": "user", "content": PROBLEM.question},
    ]


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
