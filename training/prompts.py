"""Prompts: the turns that stand before a response. Only words of the vocabulary, so that the small models can read them.

A prompt is a list of turns and stays one until `training.encoder` makes token ids of it: nothing is ever found again in a
text, so a question may hold any words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from training.config import unknown
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

# How a summary leads in its answer.
LEAD_IN = {"en": "the answer is", "de": "die antwort ist"}

# What the template of R1-Zero says about the form of the response, by the recipe's response_format.
TEMPLATES = {
    "answer_tags": "think in <think> </think> then answer in <answer> </answer> .",
    "boxed": "think in <think> </think> then answer in \\boxed{} .",
    "free": "think in <think> </think> then answer .",
}


class Turn(NamedTuple):
    """One turn of a conversation.

    role: "user", "assistant" or "system", or "instruction": what the template of R1-Zero says about the form of the response.
        Under a chat template it stands at the head of the first user's turn, for many a template has no system turn.
    """

    role: str
    content: str


Turns = Sequence[Turn]
Prompter = Callable[[Problem], Turns]


def ask(question: str) -> list[Turn]:
    """A bare question."""
    return [Turn("user", question)]


def chat(problem: Problem) -> list[Turn]:
    """The plain prompt of every model after the cold start: the conversation so far and the question."""
    return few_shot(problem, ())


def zero(
    problem: Problem, examples: Sequence[tuple[str, str]] = (), response_format: str = "answer_tags"
) -> list[Turn]:
    """The R1-Zero template in miniature: it fixes the structure of the response and nothing else.

    examples: (question, response) shown before the question, for a model that the template alone says nothing to.
    """
    turns = few_shot(problem, examples)
    turns.insert(
        sum(turn.role == "system" for turn in turns), Turn("instruction", TEMPLATES[response_format])
    )
    return turns


def few_shot(problem: Problem, examples: Sequence[tuple[str, str]]) -> list[Turn]:
    """Worked examples (question, response) behind any system turn, then the conversation so far and the question."""
    before = [Turn(role, content) for role, content in problem.before]
    system = [turn for turn in before if turn.role == "system"]
    shots = [
        turn
        for question, response in examples
        for turn in (Turn("user", question), Turn("assistant", response))
    ]
    return [*system, *shots, *(turn for turn in before if turn.role != "system"), *ask(problem.question)]


def reflect(problem: Problem) -> list[Turn]:
    """Asks directly for a response with reflection and verification: in German for German questions, else in English."""
    request = "denke nach und prüfe" if problem.language == "de" else "reflect and verify"
    return [*chat(problem)[:-1], *ask(f"{problem.question} {request} .")]


def judge(problem: Problem, reference: str, response: str) -> list[Turn]:
    """What the generative judge reads: question, response, and last the right answer, so that it stands beside the given one."""
    return ask(f"{problem.question} response : {response} reference : {reference}")


STYLES = ("chat", "zero")


def style(
    name: str, examples: Sequence[tuple[str, str]] = (), response_format: str = "answer_tags"
) -> Prompter:
    """The prompt that a checkpoint answers, by its name: "chat" is the bare question, "zero" the template of R1-Zero.

    Raises:
        UserError: there is no such style; the nearest one is named.
    """
    if name not in STYLES:
        raise unknown("prompt", name, STYLES)
    return chat if name == "chat" else partial(zero, examples=examples, response_format=response_format)


def with_system(before: tuple[tuple[str, str], ...], text: str) -> tuple[tuple[str, str], ...]:
    """The turns before a question behind a system prompt; a conversation that has one, and an empty `text`, stay as they are."""
    own = not text or any(role == "system" for role, _ in before)
    return before if own else (("system", text), *before)


def plain(turns: Turns) -> str:
    """The text of a prompt for a tokenizer without a chat template: "user : 1 + 1 = assistant :"."""
    words = [
        turn.content if turn.role in ("system", "instruction") else f"{turn.role} : {turn.content}"
        for turn in turns
    ]
    return " ".join([*words, "assistant :"])
