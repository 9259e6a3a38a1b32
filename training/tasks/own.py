"""A task of one's own, such as "python:my_task.py:Riddles": a class with `problems(split)` and `check(problem, answer)`.

class Riddles:
    def __init__(self, size=100): ...           # arguments: task_options of the recipe
    def problems(self, split): ...              # training.tasks.problem.Problem each; "train", "test", "harder" or "hardest"
    def check(self, problem, answer): ...       # whether the text of the answer is right
    def worked_examples(self, language): ...    # optional: (question, response) pairs for few-shot prompts
    def dictionary(self, language): ...         # optional: words of other languages -> those of this one, for the cold start

`check` is called in a process of its own, on a task that is made there from the same options and has given no problems: it knows
the problem (with what its `meta` holds) and the answer. An exception, a call that takes too long and a process that dies are
errors of the reward `accuracy` and counted as such.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from training import language, sources
from training.errors import UserError
from training.own_process import MOST_FAULTS, OwnFault, OwnProcess, serve
from training.tasks.problem import KINDS, DataError, Problem, check_split

SECONDS = 10.0  # of one check
NOT_ASKED = 100  # checks after MOST_FAULTS in a row that hung or died


class OwnTask:
    """The task of a person, with what it returns checked: the errors name the file.

    spec: "<file>:<class>". options: keyword arguments of the class.
    """

    def __init__(self, spec: str, **options: Any) -> None:
        self.name = sources.PYTHON + spec
        self._task = _made(self.name, options)
        self._process = OwnProcess(__name__, self.name, SECONDS, options)
        self._faults = self._not_asked = 0
        self.problems = cache(self._problems)

    def limit(self, seconds: float) -> None:
        """Sets the longest time of one check."""
        self._process.seconds = seconds

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is right, as the task says.

        Raises:
            OwnFault: the check raised, hung or died, or it did so MOST_FAULTS times in a row and is not asked for a while.
        """
        if self._not_asked:
            self._not_asked -= 1
            raise OwnFault(f"not asked after {MOST_FAULTS} checks that hung or died")
        try:
            found: bool | str = self._process.ask((problem, answer))
        except OwnFault:
            self._faults += 1
            if self._faults == MOST_FAULTS:
                self._faults, self._not_asked = 0, NOT_ASKED
            raise
        self._faults = 0
        if isinstance(found, str):
            raise OwnFault(found)
        return found

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """Those of the task; none where it has no such method."""
        shown = getattr(self._task, "worked_examples", None)
        return [] if shown is None else [(question, response) for question, response in shown(language)]

    def dictionary(self, language: str) -> dict[str, str]:
        """That of the task; empty where it has no such method."""
        told = getattr(self._task, "dictionary", None)
        return {} if told is None else dict(told(language))

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


def _made(spec: str, options: Mapping[str, Any]) -> Any:
    """The task of a person."""
    maker = sources.load(spec)
    try:
        task = maker(**options)
    except TypeError as error:
        raise UserError(f"{spec}: {error}") from None
    for method in ("problems", "check"):
        if not callable(getattr(task, method, None)):
            raise UserError(f"{spec}: expected a class with the method {method!r}")
    return task


def _answering(spec: str, options: Mapping[str, Any]) -> Callable[[tuple[Problem, str]], bool | str]:
    """In the process: problem and answer -> whether it is right, or the text of an error."""
    task = _made(spec, options)

    def answer(asked: tuple[Problem, str]) -> bool | str:
        try:
            return bool(task.check(*asked))
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return answer


def _asked(problem: Problem) -> tuple[tuple[tuple[str, str], ...], str]:
    """What a model sees of a problem."""
    return problem.before, problem.question


if __name__ == "__main__":
    serve(_answering)
