"""Filters of sampled responses: each one gives the reason to reject a sample, or None to keep it.

They make the data of cold start, rejection sampling and distillation readable: right by rule or by the judge, one
language, no overlong paragraph, no code block where none belongs, no repetition, in format, finished, no duplicate.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from training import language, rewards
from training.config import unknown
from training.errors import UserError
from training.rewards import Sample
from training.tasks.problem import Task

_CODE = re.compile(r"```|~~~")
_PIECE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
_PARAGRAPH = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Settings:
    """Limits of the filters, and what the two checks of correctness need.

    task: the task that checks answers, or tasks by name (wrong_by_rule).
    verdicts: (problem id, sample id) -> the judge's verdict; None for one that could not be read, which counts
        as wrong (wrong_by_judge).
    min_consistency: least share of words in the problem's language, in the thinking and in the summary each.
    paragraph_words: most words of a paragraph (text between blank lines, split at spaces).
    loop_repeats, loop_tokens: a stretch of tokens is a loop where a piece of any length stands that many times in
        a row and the whole stretch has at least so many tokens.
    """

    task: Task | Mapping[str, Task] | None = None
    verdicts: Mapping[tuple[str, int], bool | None] = field(default_factory=dict)
    min_consistency: float = 0.95
    paragraph_words: int = 200
    loop_repeats: int = 3
    loop_tokens: int = 12


def wrong_by_rule(sample: Sample, settings: Settings) -> str | None:
    """The task finds the answer wrong, or its check raised."""
    if settings.task is None:
        raise UserError("filters: wrong_by_rule needs the task that checks the answers")
    reward = rewards.accuracy(sample, settings.task)
    return None if reward.value == 1.0 else reward.reason


def wrong_by_judge(sample: Sample, settings: Settings) -> str | None:
    """The judge found the response wrong, gave no readable verdict, or was not asked."""
    identifier = (sample.problem.id, sample.sample_id)
    if identifier not in settings.verdicts:
        return "the judge was not asked"
    verdict = settings.verdicts[identifier]
    if verdict is None:
        return "the verdict cannot be read"
    return None if verdict else "the judge says wrong"


def mixed_language(sample: Sample, settings: Settings) -> str | None:
    """Too few words of the thinking or of the summary are in the language of the problem. No known words are no
    mix, and a language whose words cannot be told has none."""
    for part, text in (("thinking", sample.response.think), ("summary", sample.response.summary)):
        if text and language.is_known(sample.problem.language) and language.known_words(text):
            share = language.consistency(text, sample.problem.language)
            if share < settings.min_consistency:
                return f"{share:.0%} of the words of the {part} are {sample.problem.language}"
    return None


def overlong_paragraph(sample: Sample, settings: Settings) -> str | None:
    """A paragraph has too many words, numbers and operators (Han and kana: characters, as they have no spaces)."""
    longest = max(len(_PIECE.findall(paragraph)) for paragraph in _PARAGRAPH.split(sample.text))
    return f"a paragraph of {longest} words" if longest > settings.paragraph_words else None


def code_block(sample: Sample, settings: Settings) -> str | None:
    """There is a fenced code block. For tasks whose answers are no code."""
    return "a code block" if _CODE.search(sample.text) else None


def repetition(sample: Sample, settings: Settings) -> str | None:
    """The same piece of tokens stands several times in a row."""
    ids = np.asarray(sample.token_ids)
    for period in range(1, len(ids) // settings.loop_repeats + 1):
        needed = max(settings.loop_repeats * period, settings.loop_tokens) - period
        equal = np.concatenate(([0], np.cumsum(ids[period:] == ids[:-period])))
        # A loop is a window of `needed` tokens that all equal the token one period before.
        if len(equal) > needed and (equal[needed:] - equal[:-needed] == needed).any():
            return f"a piece of {period} tokens stands {settings.loop_repeats} times or more in a row"
    return None


def bad_format(sample: Sample, settings: Settings) -> str | None:
    """The response is not in the form that the format reward asks for."""
    reward = rewards.format(sample)
    return None if reward.value == 1.0 else reward.reason


def unfinished(sample: Sample, settings: Settings) -> str | None:
    """The response did not end by itself."""
    return None if sample.finished else "cut at the token limit"


Filter = Callable[[Sample, Settings], str | None]
FILTERS: dict[str, Filter] = {
    "unfinished": unfinished,
    "bad_format": bad_format,
    "code_block": code_block,
    "repetition": repetition,
    "overlong_paragraph": overlong_paragraph,
    "mixed_language": mixed_language,
    "wrong_by_rule": wrong_by_rule,
    "wrong_by_judge": wrong_by_judge,
}
DUPLICATE = "duplicate"


def check_names(names: Iterable[str]) -> None:
    """Raise UserError where a filter is unknown, naming the nearest one."""
    known = (*FILTERS, DUPLICATE)
    for name in names:
        if name not in known:
            raise unknown("filter", name, known)


def apply(
    samples: Sequence[Sample], names: Sequence[str], settings: Settings, *, examples: int = 3
) -> tuple[list[Sample], Counter[str], dict[str, list[tuple[Sample, str]]]]:
    """Keep the samples to which no filter objects.

    Every filter sees every sample, so a sample may be counted under several; only "duplicate" (the same text for
    the same problem) looks at what the others keep, and the first one stays.

    Args:
        names: filters, from FILTERS or "duplicate", in the order in which their counts are listed.
        examples: rejected samples to show a filter.

    Returns:
        The kept samples in order; rejections by filter (0 where there are none); for each filter its first
        rejected samples with the reason.
    """
    check_names(names)
    kept: list[Sample] = []
    rejections: Counter[str] = Counter(dict.fromkeys(names, 0))
    shown: dict[str, list[tuple[Sample, str]]] = {name: [] for name in names}
    seen: set[tuple[str, str]] = set()
    for sample in samples:
        reasons = {name: FILTERS[name](sample, settings) for name in names if name != DUPLICATE}
        identity = (sample.problem.id, sample.text)
        objections = {name: reason for name, reason in reasons.items() if reason is not None}
        if not objections and DUPLICATE in names and identity in seen:
            objections[DUPLICATE] = "the same response was kept before"
        for name, reason in objections.items():
            rejections[name] += 1
            if len(shown[name]) < examples:
                shown[name].append((sample, reason))
        if not objections:
            seen.add(identity)
            kept.append(sample)
    return kept, rejections, shown
