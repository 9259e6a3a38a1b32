"""Refinement: named rules that make a sampled response readable without adding anything to what it says.

Each rule takes the text of a response and its problem and returns the text, changed or not. No rule corrects a step or changes
an answer: what is wrong stays so, for the filters to reject. Only words that the task has a translation of are translated, as
the paper had DeepSeek-V3 translate what R1-Zero had thought into the language of the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from training.prompts import LEAD_IN
from training.response import ANSWER_CLOSE, ANSWER_OPEN, SPECIAL, THINK_CLOSE, THINK_OPEN, parse
from training.tasks.problem import Problem

# A sentence (no tag inside, a full stop at its end) and its copies right behind it.
_REPEATED = re.compile(r"(?<!\S)(?P<sentence>[^\s.<>|][^.<>|]* \.)(?: (?P=sentence))+(?!\S)")


def cut_after_answer(text: str, problem: Problem) -> str:
    """Drops what follows the first closing answer tag."""
    head, tag, _ = text.partition(ANSWER_CLOSE)
    return head + tag


def drop_repeated_sentences(text: str, problem: Problem) -> str:
    """Drops a sentence that is the same as the one before it."""
    return _REPEATED.sub(r"\g<sentence>", text)


def special_token_form(text: str, problem: Problem) -> str:
    """Puts the thinking between special tokens instead of think tags, where there is exactly one block of it."""
    if text.count(THINK_OPEN) == text.count(THINK_CLOSE) == 1 and SPECIAL not in text:
        return text.replace(THINK_OPEN, SPECIAL).replace(THINK_CLOSE, SPECIAL)
    return text


def summary_sentence(text: str, problem: Problem) -> str:
    """Leads in a summary that is the bare answer by words of the question's language ("the answer is")."""
    response = parse(text)
    lead_in = LEAD_IN.get(problem.language)
    if not response.well_formed or response.summary != response.answer or lead_in is None:
        return text
    return text.replace(ANSWER_OPEN, f"{lead_in} {ANSWER_OPEN}")


Rule = Callable[[str, Problem], str]
RULES: dict[str, Rule] = {
    "cut_after_answer": cut_after_answer,
    "drop_repeated_sentences": drop_repeated_sentences,
    "special_token_form": special_token_form,
    "summary_sentence": summary_sentence,
}


def translation(dictionary: Mapping[str, str]) -> Rule:
    """The rule that puts, for every word or phrase of the dictionary that stands between spaces, what it means."""
    longest_first = sorted(dictionary, key=len, reverse=True)
    known = re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, longest_first))})(?!\S)")
    return lambda text, problem: known.sub(lambda found: dictionary[found[0]], text)


def refine(
    text: str, problem: Problem, dictionary: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, list[str]]:
    """Applies all rules in order; returns the text and the names of the rules that changed it.

    dictionary: words and phrases of other languages, with what stands for them in the language of the problem.
    """
    rules = {**RULES, "translation": translation(dictionary)} if dictionary else RULES
    applied = []
    for name, rule in rules.items():
        changed = rule(text, problem)
        if changed != text:
            applied.append(name)
        text = changed
    return text, applied
