"""A stage that trains several models one after the other, with one set of files and one resume point.

Each part logs into the stage's own metrics.jsonl with `part` in every line. The resume point belongs to the part
that is under way and lists the metrics of the parts that are finished, so a killed stage goes on in the middle of a
part and repeats none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from training.context import StageContext
from training.run_dir import StageDir, State


class PartDir(StageDir):
    """The folder of a stage as one of its parts sees it."""

    def __init__(self, stage: StageDir, part: str, finished: Mapping[str, Any]) -> None:
        super().__init__(stage.path)
        self.part = part
        self.finished = dict(finished)

    def log(self, **metrics: Any) -> None:
        """Appends one line to metrics.jsonl, marked with the part."""
        super().log(part=self.part, **metrics)

    def add_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to samples.jsonl, marked with the part."""
        super().add_samples({"part": self.part, **row} for row in rows)

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, Any]) -> None:
        """Writes a resume point of this part."""
        super().save_state(
            step, tensors, {"part": self.part, "finished": self.finished, "counters": dict(counters)}
        )

    def load_state(self) -> State | None:
        """The resume point, where it is one of this part."""
        state = super().load_state()
        if state is None or state.counters["part"] != self.part:
            return None
        return replace(state, counters=state.counters["counters"])


def run_parts(
    context: StageContext, names: Sequence[str], work: Callable[[StageContext, str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Does `work(context of the part, name)` for every name that is not yet finished, in order.

    Returns:
        The metrics that `work` returned, by name; JSON values, for they are kept in the resume point.
    """
    state = context.stage.load_state()
    finished: dict[str, dict[str, Any]] = dict(state.counters["finished"]) if state else {}
    for name in names:
        if name not in finished:
            part = PartDir(context.stage, name, finished)
            finished[name] = work(replace(context, name=f"{context.name}-{name}", stage=part), name)
            context.stage.save_state(0, {}, {"part": "", "finished": finished})
    return finished
