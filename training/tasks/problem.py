"""What a task is: a source of problems, the check of their answers, and the split into train and test."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from training.errors import UserError

KINDS = ("reasoning", "helpful", "unsafe")
SPLITS = ("train", "test", "harder", "hardest")


class DataError(UserError):
    """A problem that is itself broken, such as a reference that cannot be parsed. It never becomes a reward."""


@dataclass(frozen=True)
class Problem:
    """One question with what is needed to judge a response to it.

    id: stable name, see `problem_id`.
    task: name of the task that made it.
    kind: "reasoning" (checked by rule), "helpful" or "unsafe" (judged by preference).
    language: BCP-47 tag of the question, such as "en", "de" or "zh-CN".
    question: bare text, without any template.
    reference: the right answer (reasoning), the required fact (helpful), the forbidden token (unsafe).
    level: difficulty, named by the task.
    thinking: False where a response without a thinking block is in format (a greeting needs no thought).
    meta: whatever else the task needs for its check, or a person's reward.
    before: role and content of the turns of a conversation that stand before the question.
    """

    id: str
    task: str
    kind: str
    language: str
    question: str
    reference: str
    level: str = ""
    thinking: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    before: tuple[tuple[str, str], ...] = ()


class Task(Protocol):
    """A source of problems. `problems` is deterministic and its train and test splits are disjoint."""

    name: str

    def problems(self, split: str) -> Sequence[Problem]:
        """Problems of the split "train", "test", "harder" or "hardest"; the last two may be empty."""
        ...

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the text of the answer block is right. May raise: the caller counts and shows it."""
        ...

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """Pairs of question and response in the special-token form, for few-shot prompts only."""
        ...


@runtime_checkable
class Translator(Protocol):
    """A task that knows what the words of its responses are in other languages."""

    def dictionary(self, language: str) -> Mapping[str, str]:
        """Words and phrases of other languages -> what stands for them in `language`; the cold start refines with it."""
        ...


def problem_id(task: str, level: str, question: str, language: str) -> str:
    """Stable name of a problem: 16 hex digits of the SHA-256 of what identifies it."""
    return hashlib.sha256(f"{task}\x1f{level}\x1f{question}\x1f{language}".encode()).hexdigest()[:16]


def split_of(identifier: str, test_share: float = 0.1) -> str:
    """Return "train" or "test" as a pure function of the problem's id, so that no problem is ever in both.

    test_share: expected share of "test", between 0 and 1.
    """
    digest = hashlib.sha256(b"split\x1f" + identifier.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_share * 2**64 else "train"


def check_split(split: str) -> None:
    """Raise UserError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise UserError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
