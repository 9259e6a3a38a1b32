"""Rejection: which sampled responses go into the SFT mix, and which were refused by what.

A reasoning response has to be right by the rule, or, for the problems that are treated as if no rule could check
them, by the generative judge. A response to any other question may think only
where the question needs it, and has to be helpful or harmless by the oracle where that is asked for: of such data
people check a part. All of them pass the readability filters.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from training import filters, preferences, seeding
from training.loops.sample import Completion
from training.responses import Source, as_sample, row
from training.rewards import Sample

EXAMPLES = 3  # rejected responses kept for each filter


@dataclass
class Selection:
    """What came through and what did not.

    kept: data rows. rejections: filter -> responses that it rejected (a response may be counted under several).
    examples: rows of rejected responses with "filter" and "reason". asked: responses that were looked at.
    """

    kept: list[dict[str, Any]] = field(default_factory=list)
    rejections: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0

    def reject(self, name: str, reason: str, rejected: dict[str, Any]) -> None:
        """Count a rejection and keep it as an example while there are few."""
        self.rejections[name] += 1
        if sum(example["filter"] == name for example in self.examples) < EXAMPLES:
            self.examples.append({"filter": name, "reason": reason, **rejected})

    def add(self, other: "Selection") -> None:
        """Take over what another selection found."""
        self.kept += other.kept
        self.rejections.update(other.rejections)
        self.asked += other.asked
        for example in other.examples:
            if sum(known["filter"] == example["filter"] for known in self.examples) < EXAMPLES:
                self.examples.append(example)


def select(
    drawn: Sequence[Completion],
    source: Source,
    seed: int,
    names: Sequence[str],
    settings: filters.Settings,
    *,
    checked_by: str,
) -> Selection:
    """Apply the named filters to sampled responses.

    Args:
        drawn, source, seed: the responses and where they come from.
        names: filters of the recipe; of the two for a wrong answer only that of `checked_by` is applied.
        settings: of the filters.
        checked_by: what decides whether a response is right: "rule" or "judge" for reasoning, "oracle" or "nobody" for
            everything else.
    """
    left_out = {"rule": ("wrong_by_judge",), "judge": ("wrong_by_rule",)}
    active = [
        name for name in names if name not in left_out.get(checked_by, ("wrong_by_rule", "wrong_by_judge"))
    ]
    rows = {
        (each.problem.id, each.sample_id): row(each, source, seed, checked_by=checked_by) for each in drawn
    }
    found = Selection(rejections=Counter(dict.fromkeys(active, 0)), asked=len(drawn))
    samples = [as_sample(completion, source.response_format) for completion in drawn]
    if checked_by in ("oracle", "nobody"):
        by_oracle = checked_by == "oracle"
        samples = [
            _without_fact(sample) for sample in samples if _answers_well(sample, by_oracle, rows, found)
        ]
    kept, rejections, examples = filters.apply(samples, active, settings, examples=EXAMPLES)
    for name, shown in examples.items():
        for sample, reason in shown:
            found.examples.append(
                {"filter": name, "reason": reason, **rows[sample.problem.id, sample.sample_id]}
            )
    found.rejections.update(rejections)
    found.kept = [rows[sample.problem.id, sample.sample_id] for sample in kept]
    return found


def nothing_kept(stage: str, asked: int, rejections: Mapping[str, int]) -> str:
    """What to say where no response passed: which filters refused them, the strictest first."""
    refused = ", ".join(f"{name} {count}" for name, count in Counter(rejections).most_common(3) if count)
    return (
        f"{stage}: none of {asked} responses passed the filters (refused by {refused or 'none'}): raise {stage}.prompts or "
        f"{stage}.samples, shorten {stage}.filters, or train longer before"
    )


def in_share(problem_id: str, share: float, *key: int | str) -> bool:
    """Whether a problem, and so all its samples, falls into a share of the problems: a keyed draw of its id."""
    return bool(seeding.numpy_rng(*key, problem_id).random() < share)


def _answers_well(
    sample: Sample, by_oracle: bool, rows: dict[tuple[str, int], dict[str, Any]], found: Selection
) -> bool:
    """Whether a general response thinks no more than its question needs and, `by_oracle`, does what it should.

    Counts what it rejects.
    """
    rejected = rows[sample.problem.id, sample.sample_id]
    if by_oracle and not preferences.oracle(sample.problem, sample.response):
        fault = (
            ("unhelpful", "not in the summary") if sample.problem.kind == "helpful" else ("harmful", "said")
        )
        found.reject(fault[0], f"{sample.problem.reference!r} is {fault[1]}", rejected)
        return False
    if not sample.problem.thinking and sample.response.think is not None:
        found.reject("needless_thinking", "the question needs no thinking", rejected)
        return False
    return True


def _without_fact(sample: Sample) -> Sample:
    """The sample with the required fact cut out of the summary: what was asked for may be in another language."""
    summary = sample.response.summary or ""
    bare = re.sub(rf"(?<!\w){re.escape(sample.problem.reference)}(?!\w)", " ", summary, flags=re.IGNORECASE)
    return replace(sample, response=replace(sample.response, summary=bare.strip() or None))
