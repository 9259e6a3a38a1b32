"""Prompt texts: what stands before a response. Only words of the vocabulary, so that the small models can read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from training.tasks.problem import Problem

WORDS: dict[str, tuple[str, ...]] = {
    "neutral": ("user", "assistant", "analysis", "correctness"),
    "en": (
        "think",
        "in",
        "then",
        "answer",
        "reflect",
        "and",
        "verify",
        "response",
        "reference",
        "right",
        "wrong",
    ),
    "de": ("denke", "nach", "und", "prüfe"),
}

# A question, and the response that follows it in a worked example.
_TURN = re.compile(r"user : (.*?) assistant :(.*?)(?=user : |$)", re.DOTALL)

# How a summary leads in its answer.
LEAD_IN = {"en": "the answer is", "de": "die antwort ist"}


def ask(question: str) -> str:
    """A bare question, and whose turn it is."""
    return f"user : {question} assistant :"


def chat(problem: Problem) -> str:
    """The plain prompt of every model after the cold start."""
    return ask(problem.question)


def zero(problem: Problem, examples: Sequence[tuple[str, str]] = ()) -> str:
    """The R1-Zero template in miniature: it fixes the structure of the response and nothing else.

    examples: (question, response) shown before the question, for a model that the template alone says nothing to.
    """
    return f"think in <think> </think> then answer in <answer> </answer> . {few_shot(problem, examples)}"


def few_shot(problem: Problem, examples: Sequence[tuple[str, str]]) -> str:
    """Worked examples (question, response), then the question."""
    shots = [f"{ask(question)} {response}" for question, response in examples]
    return " ".join([*shots, chat(problem)])


def reflect(problem: Problem) -> str:
    """Asks directly for a response with reflection and verification: in German for German questions, else in English."""
    request = "denke nach und prüfe" if problem.language == "de" else "reflect and verify"
    return ask(f"{problem.question} {request} .")


def turns(prompt: str) -> list[dict[str, str]]:
    """A prompt as the turns of a chat template, which marks them itself: the user's, and the assistant's of the examples.

    What stands before the first turn belongs to it. prompt: one that this module wrote.
    """
    before, _, _ = prompt.partition("user : ")
    messages = []
    for question, response in _TURN.findall(prompt):
        messages.append({"role": "user", "content": question})
        if response:
            messages.append({"role": "assistant", "content": response.strip()})
    messages[0]["content"] = before + messages[0]["content"]
    return messages


def judge(problem: Problem, reference: str, response: str) -> str:
    """What the generative judge reads: question, response, and last the right answer, so that it stands beside the given one."""
    return f"user : {problem.question} response : {response} reference : {reference} assistant :"
