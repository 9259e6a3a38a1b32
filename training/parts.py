"""A stage that trains several models, with one set of files and one resume point for each.

A part has a folder of its own below the stage's while it is under way, with its resume point and the lines that it logs, each
marked with `part`. When it has ended its lines become the stage's, whose resume point lists the metrics of such parts: a killed
stage goes on in the middle of a part and repeats none. Several ranks train all models together, one after the other, or small
ones each by itself, as one process would.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from training import files, notices
from training.context import StageContext
from training.parallel import ranks
from training.run_dir import APPEND_ONLY, PROFILE, StageDir

# operations of the largest part that ranks do apart: one that has no more to do waits for the others' last ones
APART = 2**42
_ENDED = "ended.json"


class PartDir(StageDir):
    """The folder of a stage as one of its parts sees it."""

    def __init__(self, stage: StageDir, part: str) -> None:
        super().__init__(stage.folder_of(part))
        self.name, self.part = stage.name, part

    def log(self, **metrics: Any) -> None:
        """Appends one line to metrics.jsonl, marked with the part."""
        super().log(part=self.part, **metrics)

    def add_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to samples.jsonl, marked with the part."""
        super().add_samples({"part": self.part, **row} for row in rows)

    @ranks.by_main
    def open(self) -> dict[str, Any] | None:
        """Makes the folder; the metrics of a part that has ended while others were under way."""
        with files.disk_faults(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        ended = self.path / _ENDED
        return dict(files.read_json(ended)) if ended.is_file() else None

    @ranks.by_main
    def end(self, metrics: Mapping[str, Any]) -> None:
        """Keeps what the part has ended with; its lines are on the disk before."""
        files.sync(self.path)
        files.write_json(self.path / _ENDED, metrics)

    @ranks.by_main
    def hand_over(self, stage: StageDir) -> None:
        """Makes the lines of the part the stage's, and tells what it was warned of apart."""
        for row in self.warnings():
            notices.warn(row["kind"], row["text"])
        for name in APPEND_ONLY:
            stage.append(name, self.rows(name))
        if (self.path / PROFILE).is_file():
            (self.path / PROFILE).replace(stage.path / PROFILE)

    @ranks.by_main
    def remove(self) -> None:
        """Removes the folder."""
        files.remove(self.path)


def run_parts(
    context: StageContext,
    names: Sequence[str],
    work: Callable[[StageContext, str], dict[str, Any]],
    operations: Callable[[str], float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Does `work(context of the part, name)` for every name that is not yet finished, in order.

    operations: about as many as the work of a part takes; None: ranks do all parts together. Parts that ranks do apart must not
        need each other.

    Returns:
        The metrics that `work` returned, by name, those of an earlier call for the stage too; JSON values, for they are kept in
        the resume point.
    """
    state = context.stage.load_state()
    finished: dict[str, dict[str, Any]] = dict(state.counters["finished"]) if state else {}
    for name in finished:  # a kill may have left their folders
        PartDir(context.stage, name).remove()

    def do(name: str) -> dict[str, Any]:
        part = PartDir(context.stage, name)
        metrics = part.open()
        if metrics is None:
            metrics = work(replace(context, name=f"{context.name}-{name}", stage=part), name)
            part.end(metrics)
        return metrics

    def do_apart(name: str) -> dict[str, Any]:
        with notices.listening(PartDir(context.stage, name).add_warning):
            return do(name)

    def take(name: str, metrics: dict[str, Any]) -> None:
        part = PartDir(context.stage, name)
        part.hand_over(context.stage)
        finished[name] = metrics
        context.stage.save_state(0, {}, {"finished": finished})
        part.remove()

    left = [name for name in names if name not in finished]
    weights = [operations(name) for name in left] if operations and _may_be_apart(context) else []
    if weights and max(weights) <= APART and ranks.even(weights):
        for name, metrics in zip(left, ranks.apart(do_apart, left, weights), strict=True):
            take(name, metrics)
    else:
        for name in left:
            take(name, do(name))
    return finished


def _may_be_apart(context: StageContext) -> bool:
    """Whether a rank can do a part by itself: rank 0 alone speaks to sinks and servers, and of a divided model each has a part."""
    recipe = context.recipe
    return (
        ranks.world() > 1
        and recipe.parallel.shard == 1
        and recipe.rollout.engine == "transformers"
        and not recipe.sinks
    )
