"""A task of one's own, such as "python:my_task.py:Riddles": a class with `problems(split)` and `check(problem, answer)`.

class Riddles:
    def __init__(self, size=100): ...           # arguments: task_options of the recipe
    def problems(self, split): ...              # training.tasks.problem.Problem each; "train", "test", "harder" or "hardest"
    def check(self, problem, answer): ...       # whether the text of the answer is right
    def worked_examples(self, language): ...    # optional: (question, response) pairs for few-shot prompts
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from training import language, sources
from training.errors import UserError
from training.tasks.problem import KINDS, DataError, Problem, check_split


class OwnTask:
    """The task of a person, with what it returns checked: the errors name the file.

    spec: "<file>:<class>". options: keyword arguments of the class.
    """

    def __init__(self, spec: str, **options: Any) -> None:
        self.name = sources.PYTHON + spec
        maker = sources.load(self.name)
        try:
            self._task = maker(**options)
        except TypeError as error:
            raise UserError(f"{self.name}: {error}") from None
        for method in ("problems", "check"):
            if not callable(getattr(self._task, method, None)):
                raise UserError(f"{self.name}: expected a class with the method {method!r}")
        self.problems = cache(self._problems)

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is right, as the task says."""
        return bool(self._task.check(problem, answer))

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """Those of the task; none where it has no such method."""
        shown = getattr(self._task, "worked_examples", None)
        return [] if shown is None else [(question, response) for question, response in shown(language)]

    def _problems(self, split: str) -> Sequence[Problem]:
        check_split(split)
        found: dict[str, Problem] = {}
        for problem in self._task.problems(split):
            if not isinstance(problem, Problem):
                raise DataError(
                    f"{self.name}: problems({split!r}) gave {problem!r:.80}, expected Problem of training.tasks"
                )
            if problem.kind not in KINDS:
                raise DataError(f"{self.name}: problem {problem.id}: unknown kind {problem.kind!r}")
            if problem.id in found:
                raise DataError(f"{self.name}: problems({split!r}) gave the id {problem.id!r} twice")
            try:
                tag = language.tag(problem.language)
            except ValueError as error:
                raise DataError(f"{self.name}: problem {problem.id}: {error}") from None
            found[problem.id] = replace(problem, task=self.name, language=tag)
        if split != "train":
            learnt = self.problems("train")
            ids, questions = {each.id for each in learnt}, {_asked(each) for each in learnt}
            both = [each.id for each in found.values() if each.id in ids or _asked(each) in questions]
            if both:
                raise DataError(
                    f"{self.name}: problem {both[0]!r} or its question is in train and in {split}"
                )
        return list(found.values())


def _asked(problem: Problem) -> tuple[tuple[tuple[str, str], ...], str]:
    """What a model sees of a problem."""
    return problem.before, problem.question
