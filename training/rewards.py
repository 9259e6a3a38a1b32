"""Rewards: pure functions of one sample that return a number and the reason for it.

    reasoning:  accuracy + format + language consistency                (rule = accuracy + format)
    general:    reward model + format + language consistency            (helpful or harmless, by the kind)

with the weights of the recipe; for one prompt only the terms of its kind are live, so both lines are one sum
(DeepSeek-R1, arXiv 2501.12948v2, equations 4 and 7 to 10). A reward of None skips the sample: its group is
normalised without it. An exception becomes None with a reason that begins with "error", is counted by
`errors`, and is never a silent 0. Preference models score in [0, 1], so that no term drowns another.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec

from training import language, sources
from training.config import unknown
from training.errors import UserError
from training.own_process import OwnFault
from training.response import Response
from training.tasks.problem import Problem, Task

# The last share of the steps of rl_all, in which the preference terms are live (400 of 1,700 in the paper).
PREFERENCE_SHARE = 400 / 1700

# The terms of each kind of problem. Shaping terms apply to all of them, where the recipe names them.
LIVE_TERMS = {
    "reasoning": ("accuracy", "format", "language_consistency"),
    "helpful": ("helpful", "format", "language_consistency"),
    "unsafe": ("harmless", "format", "language_consistency"),
}
SHAPING_TERMS = ("overlong", "repetition")
TERMS = ("accuracy", "helpful", "harmless", "format", "language_consistency", *SHAPING_TERMS)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response to a problem.

    text: decoded response without end-of-sequence token. response: its parse. token_ids: its tokens.
    sample_id: number of the sample among those of its problem. finished: it ended with end-of-sequence.
    """

    problem: Problem
    text: str
    response: Response
    token_ids: tuple[int, ...]
    sample_id: int = 0
    finished: bool = True

    @property
    def question(self) -> str:
        """The question that it answers."""
        return self.problem.question

    @property
    def reference(self) -> str:
        """The right answer to it."""
        return self.problem.reference


@dataclass(frozen=True, slots=True)
class Reward:
    """A value with the reason for it; None skips the sample."""

    value: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample with its weighted total (None: skipped) and the reward of every live term."""

    sample: Sample
    total: float | None
    parts: dict[str, Reward]


# A reward of one's own: samples -> one Reward each (training.own_rewards).
OwnScorer = Callable[[Sequence[Sample]], Sequence[Reward]]
# A preference model: problems with the text to judge -> one score in [0, 1] each.
Scorer = Callable[[Sequence[tuple[Problem, str]]], Sequence[float]]

P = ParamSpec("P")


def _counted(reward: Callable[P, Reward]) -> Callable[P, Reward]:
    """The same reward, with None and the exception as the reason where it raises: a verifier may raise anything."""

    @wraps(reward)
    def counted(*args: P.args, **kwargs: P.kwargs) -> Reward:
        try:
            return reward(*args, **kwargs)
        except Exception as error:
            return _failure(error)

    return counted


@_counted
def accuracy(sample: Sample, task: Task | Mapping[str, Task]) -> Reward:
    """1 where the task finds the answer block right, else 0. The thinking is never looked at.

    task: the task of the problem, or tasks by name. None where its check raises.
    """
    answer = sample.response.answer
    if answer is None:
        return Reward(0.0, "no single answer: " + ", ".join(sample.response.flags))
    owner = task[sample.problem.task] if isinstance(task, Mapping) else task
    if owner.check(sample.problem, answer):
        return Reward(1.0, "right")
    return Reward(0.0, f"wrong: {answer[:60]!r} is not {sample.problem.reference[:60]!r}")


def format(sample: Sample) -> Reward:
    """1 where the response is well formed (without thinking where the problem needs none), else 0."""
    flags = sample.response.flags
    if not flags:
        return Reward(1.0, "well formed")
    if flags == ("no_think",) and not sample.problem.thinking:
        return Reward(1.0, "well formed, and no thinking is needed")
    return Reward(0.0, ", ".join(flags))


@_counted
def language_consistency(sample: Sample) -> Reward:
    """Words of the thinking in the language of the question / all its words (equation 7).

    Where a problem needs no thinking and the response has none, its summary is read instead. No thinking or no
    words give 0, so that silence earns nothing; a language that cannot be told gives None.
    """
    language.check_language(sample.problem.language)
    text = sample.response.think
    if text is None and sample.response.flags == ("no_think",) and not sample.problem.thinking:
        text = sample.response.summary
    if text is None:
        return Reward(0.0, "no single thinking block")
    value = language.consistency(text, sample.problem.language)
    return Reward(value, f"{value:.0%} of the words are {sample.problem.language}")


def overlong(sample: Sample, length_limit: int) -> Reward:
    """Soft penalty in the last fifth before the limit (DAPO, arXiv 2503.14476, equation 13).

        0 if length <= limit - margin;  (limit - margin - length) / margin up to the limit;  -1 beyond it

    with margin = limit / 5. length_limit: tokens a response may have; lengths are in tokens.
    """
    margin = length_limit / 5
    length = len(sample.token_ids)
    value = -min(1.0, max(0.0, (length - (length_limit - margin)) / margin))
    return Reward(value, f"{length} of {length_limit} tokens")


def repetition(sample: Sample, size: int = 4) -> Reward:
    """Minus the share of token n-grams that already occurred: -(1 - distinct / all). Short texts give 0.

    size: n of the n-grams. On token ids, so that it works for languages without spaces.
    """
    ids = sample.token_ids
    total = len(ids) - size + 1
    if total < 1:
        return Reward(0.0, "too short to repeat")
    distinct = len({ids[start : start + size] for start in range(total)})
    return Reward(distinct / total - 1.0, f"{total - distinct} of {total} {size}-grams repeat")


def live_terms(kind: str, terms: Iterable[str]) -> tuple[str, ...]:
    """The terms that problems of a kind can earn, with those of one's own among `terms`."""
    return LIVE_TERMS[kind] + SHAPING_TERMS + tuple(name for name in terms if name.startswith(sources.PYTHON))


def check_terms(terms: Mapping[str, float]) -> None:
    """Raise UserError where a term is unknown (naming the nearest one), one of one's own ("python:<file>:<function>") is not
    there, or a weight is not a finite number."""
    for name, weight in terms.items():
        if name.startswith(sources.PYTHON):
            sources.argument_of(name)
        elif name not in TERMS:
            raise unknown("reward term", name, TERMS)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"rewards.{name}: expected a finite number as weight, got {weight!r}")


def check_languages(where: str, terms: Mapping[str, float], problems: Iterable[Problem]) -> None:
    """Raise UserError where the language of a problem is rewarded and cannot be told. where: the setting that has the terms."""
    if terms.get("language_consistency"):
        for tag in sorted({problem.language for problem in problems}):
            try:
                language.check_language(tag)
            except UserError as error:
                raise UserError(f"{where}.language_consistency: {error}") from None


def score(
    samples: Sequence[Sample],
    terms: Mapping[str, float],
    task: Task | Mapping[str, Task],
    *,
    preferences: Mapping[str, Scorer] | None = None,
    own: Mapping[str, OwnScorer] | None = None,
    length_limit: int | None = None,
) -> list[Scored]:
    """Score samples: total = sum of weight * value over the terms that are live for the kind of the problem.

    Args:
        samples: any mix of kinds.
        terms: weight of each term, names from TERMS or of `own`. Terms of weight 0 are not computed.
        task: the task that checks answers, or tasks by name.
        preferences: scorers "helpful" (given the summary only) and "harmless" (given the whole response); None
            where the preference terms are not live (yet).
        own: the rewards of one's own by name, live for every kind.
        length_limit: tokens a response may have; needed by "overlong".

    Returns:
        One Scored a sample, in order. A term that raised or returned None makes the total None.

    Raises:
        UserError: unknown term, weight that is no number, or "overlong" without a limit.
    """
    check_terms(terms)
    if terms.get("overlong") and length_limit is None:
        raise UserError("rewards.overlong: needs the maximal number of new tokens")
    judged = _judge(samples, terms, preferences or {})
    brought = {name: reward(samples) for name, reward in (own or {}).items()}

    def part(name: str, index: int, sample: Sample) -> Reward | None:
        match name:
            case "accuracy":
                return accuracy(sample, task)
            case "format":
                return format(sample)
            case "language_consistency":
                return language_consistency(sample)
            case "overlong":
                return overlong(sample, length_limit or 0)
            case "repetition":
                return repetition(sample)
        if name in brought:
            return brought[name][index]
        return judged.get(index)

    scored = []
    for index, sample in enumerate(samples):
        live = live_terms(sample.problem.kind, terms)
        parts = {name: part(name, index, sample) for name in live if terms.get(name)}
        present = {name: reward for name, reward in parts.items() if reward is not None}
        scored.append(Scored(sample, _total(present, terms), present))
    return scored


def rl_all(
    samples: Sequence[Sample],
    terms: Mapping[str, float],
    task: Task | Mapping[str, Task],
    preferences: Mapping[str, Scorer],
    *,
    own: Mapping[str, OwnScorer] | None = None,
    step: int,
    steps: int,
    preference_share: float = PREFERENCE_SHARE,
    length_limit: int | None = None,
) -> list[Scored]:
    """Score the samples of one step of rl_all: `score`, with the preference terms in the last steps only.

    Before that, general prompts earn format and language consistency alone.

    step: this step, from 0. steps: all steps of the stage. preference_share: the last share of the steps, in
    which the preference terms are live. The rest as in `score`.
    """
    live = preferences if preferences_live(step, steps, preference_share) else None
    return score(samples, terms, task, preferences=live, own=own, length_limit=length_limit)


def preferences_live(step: int, steps: int, share: float = PREFERENCE_SHARE) -> bool:
    """Whether step `step` (from 0) of `steps` is in the last `share` of them, rounded up to whole steps."""
    last = math.ceil(steps * share - 1e-9)  # 100 * 0.07 is a little more than 7
    return step >= steps - last


def errors(scored: Iterable[Scored]) -> Counter[str]:
    """Count the reasons of rewards that raised, to be shown: "accuracy: error: ValueError: ..." -> count."""
    return Counter(
        f"{name}: {reward.reason}"
        for one in scored
        for name, reward in one.parts.items()
        if reward.value is None and reward.reason.startswith("error")
    )


def _total(parts: Mapping[str, Reward], terms: Mapping[str, float]) -> float | None:
    """The weighted sum of the parts; None where one of them is None."""
    total = 0.0
    for name, reward in parts.items():
        if reward.value is None:
            return None
        total += terms[name] * reward.value
    return total


def _failure(error: Exception) -> Reward:
    said = str(error) if isinstance(error, OwnFault) else f"{type(error).__name__}: {error}"
    return Reward(None, f"error: {said}")


def _judge(
    samples: Sequence[Sample], terms: Mapping[str, float], preferences: Mapping[str, Scorer]
) -> dict[int, Reward]:
    """Rewards of the preference models by index of the sample; one call a model for all its samples.

    The helpful model reads the summary, the safety model the whole response. A response without a summary has
    nothing that helps and gets the lowest score, 0, without being shown to the model.
    """
    judged: dict[int, Reward] = {}
    for kind, name in (("helpful", "helpful"), ("unsafe", "harmless")):
        if not terms.get(name) or name not in preferences:
            continue
        entries: list[tuple[int, tuple[Problem, str]]] = []
        for index, sample in enumerate(samples):
            if sample.problem.kind != kind:
                continue
            text = sample.response.summary if name == "helpful" else sample.text
            if text is None:
                judged[index] = Reward(0.0, "no summary")
            else:
                entries.append((index, (sample.problem, text)))
        if entries:
            rewards = _scores(preferences[name], [entry for _, entry in entries])
            judged |= {index: reward for (index, _), reward in zip(entries, rewards, strict=True)}
    return judged


def _scores(scorer: Scorer, entries: Sequence[tuple[Problem, str]]) -> list[Reward]:
    """The scores of a preference model, checked: one finite number in [0, 1] for each entry."""
    try:
        values = [float(value) for value in scorer(entries)]
        if len(values) != len(entries):
            raise ValueError(f"the scorer returned {len(values)} scores for {len(entries)} responses")
    except Exception as error:  # the whole batch is skipped and the reason shown
        return [_failure(error)] * len(entries)
    return [
        Reward(value, "preference model")
        if 0.0 <= value <= 1.0
        else _failure(ValueError(f"score {value} is not between 0 and 1"))
        for value in values
    ]
