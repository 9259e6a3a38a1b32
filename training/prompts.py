"""Prompt texts: what stands before a response. Only words of the vocabulary, so that the small models can read them."""

from __future__ import annotations

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

# How a summary leads in its answer.
LEAD_IN = {"en": "the answer is", "de": "die antwort ist"}


def ask(question: str) -> str:
    """A bare question, and whose turn it is."""
    return f"user : {question} assistant :"


def chat(problem: Problem) -> str:
    """The plain prompt of every model after the cold start."""
    return ask(problem.question)


def zero(problem: Problem) -> str:
    """The R1-Zero template in miniature: it fixes the structure of the response and nothing else."""
    return f"think in <think> </think> then answer in <answer> </answer> . {chat(problem)}"


def few_shot(problem: Problem, examples: Sequence[tuple[str, str]]) -> str:
    """Worked examples (question, response) in the special-token form, then the question."""
    shots = [f"{ask(question)} {response}" for question, response in examples]
    return " ".join([*shots, chat(problem)])


def reflect(problem: Problem) -> str:
    """Asks directly for a response with reflection and verification: in German for German questions, else in English."""
    request = "denke nach und prüfe" if problem.language == "de" else "reflect and verify"
    return ask(f"{problem.question} {request} .")


def user_turn(prompt: str) -> str:
    """A prompt as the user's turn of a chat template, which marks the turns itself."""
    return prompt.replace("user : ", "").removesuffix(" assistant :")


def judge(problem: Problem, reference: str, response: str) -> str:
    """What the generative judge reads: question, response, and last the right answer, so that it stands beside the given one."""
    return f"user : {problem.question} response : {response} reference : {reference} assistant :"
