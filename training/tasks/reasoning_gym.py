"""The procedural tasks of the package reasoning-gym, each with its own checker, such as "reasoning_gym:chain_sum".

The scorers of the package give part of the credit for some wrong answers (0.01, or a share where the answer merely
contains the right one), so only a full score counts as right. Some raise on text that they cannot read; that is
passed on, and the caller counts and shows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

from training.config import unknown
from training.errors import UserError
from training.notation import undecorated
from training.tasks.problem import DataError, Problem, check_split, problem_id, split_of


class ReasoningGymTask:
    """One data set of reasoning-gym, in English and whatever `wordings` adds.

    name: of the data set. size: problems made, train and test together. seed: of the problems; the same seed makes
    the same problems. harder: settings of the harder level over those of the others; without them it is empty.
    wordings: language -> the words that stand there in place of the English ones up to the question's first colon; every
    problem is then asked in all languages, in one split. examples: language -> worked examples, [question, response] each.
    config: settings of the data set, such as max_terms.

    Raises:
        UserError: the package is missing, or the data set, a setting or its value is not one that it knows.
    """

    def __init__(
        self,
        name: str,
        size: int = 1000,
        seed: int = 0,
        harder: Mapping[str, Any] | None = None,
        wordings: Mapping[str, str] | None = None,
        examples: Mapping[str, Sequence[Sequence[str]]] | None = None,
        **config: Any,
    ) -> None:
        try:
            from reasoning_gym.factory import DATASETS
        except ModuleNotFoundError as error:
            raise UserError(
                f"task reasoning_gym: {error}; install it with `pip install reasoning-gym`"
            ) from None
        if name not in DATASETS:
            raise unknown("data set of reasoning-gym", name, DATASETS)
        known = {field.name for field in fields(DATASETS[name][1])} - {"size", "seed"}
        for key in (*config, *(harder or {})):
            if key not in known:
                raise unknown(f"setting of reasoning_gym:{name}", key, known)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"reasoning_gym:{name}: size must be a positive integer, got {size!r}")
        self.name = f"reasoning_gym:{name}"
        self._size, self._seed = size, seed
        self._wordings = dict(wordings or {})
        for language, shown in (examples or {}).items():
            for example in shown:
                if (
                    isinstance(example, str)
                    or len(example) != 2
                    or not all(isinstance(part, str) for part in example)
                ):
                    raise UserError(
                        f"reasoning_gym:{name}: examples.{language}: expected [question, response] each, got {example!r}"
                    )
        self._examples = {
            language: [(question, response) for question, response in shown]
            for language, shown in (examples or {}).items()
        }
        self._dataset = self._create(name, config)
        self._harder = self._create(name, {**config, **harder}) if harder else None

    def problems(self, split: str) -> Sequence[Problem]:
        """Problems of the split; none is hardest. DataError where the data set has none or cannot confirm its own answer."""
        check_split(split)
        if split == "hardest":
            return []
        if split == "harder":
            return self._harder_problems
        return [problem for problem in self._problems if split_of(self._original(problem)) == split]

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the data set's scorer gives the full score, to the answer as it is or without what decorates it.

        May raise what the scorer raises.
        """
        spellings = dict.fromkeys((answer, undecorated(answer)))
        return any(self._dataset.score_answer(each, problem.meta["entry"]) == 1.0 for each in spellings)

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """Those of `examples`: the package itself has no reasoning to show."""
        return list(self._examples.get(language, ()))

    @cached_property
    def _problems(self) -> list[Problem]:
        return self._read(self._dataset, "")

    @cached_property
    def _harder_problems(self) -> list[Problem]:
        # What the ordinary level may ask too is not harder, and may be in training.
        easy = {problem.question for problem in self._problems}
        found = self._read(self._harder, "harder") if self._harder is not None else []
        return [problem for problem in found if problem.question not in easy]

    def _create(self, name: str, config: Mapping[str, Any]) -> Any:
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(name, seed=self._seed, size=self._size, **config)
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"reasoning_gym:{name}: {error or 'a setting has a wrong value'}") from None

    def _original(self, problem: Problem) -> str:
        """The id of the problem as it is asked in English, which decides its split."""
        return problem_id(self.name, problem.level, problem.meta["entry"]["question"], "en")

    def _asked(self, question: str) -> Iterator[tuple[str, str]]:
        """Language and question, for every language."""
        yield "en", question
        for language, words in self._wordings.items():
            _, colon, rest = question.partition(":")
            if not colon:
                raise UserError(f"{self.name}: wordings: expected a colon in the question {question!r}")
            yield language, words + rest

    def _read(self, dataset: Any, level: str) -> list[Problem]:
        """The entries of a data set as problems, each question once."""
        problems: dict[str, Problem] = {}
        for index in range(self._size):
            entry = dataset[index]
            question, reference = entry["question"], entry["answer"]
            if reference is None or dataset.score_answer(reference, entry) != 1.0:
                raise DataError(
                    f"{self.name}: entry {index} has no reference answer that its own checker accepts"
                )
            meta = {"entry": entry}
            for language, asked in self._asked(question):
                identifier = problem_id(self.name, level, asked, language)
                problems[identifier] = Problem(
                    identifier, self.name, "reasoning", language, asked, reference, level=level, meta=meta
                )
        return list(problems.values())
