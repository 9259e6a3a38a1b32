"""Where metrics go beside metrics.jsonl: TensorBoard, Trackio and Weights & Biases, through their own libraries.

A stage, or each part of a stage that has several, is one run of a sink, named after it; all of a run's folder are one group.
A stage that goes on continues its runs, and one that is done again has new ones. A sink that fails is warned of and left out:
metrics.jsonl has everything.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from training import files, notices, optional
from training.recipe import Recipe, to_dict

IDS = "sinks.json"  # name of a part -> the id of its runs; it lives as long as an attempt at the stage


@dataclass(frozen=True)
class Track:
    """What a sink's run is of: the folder of the run, the stage or its part, an id, the recipe, the first step that comes."""

    folder: Path
    name: str
    id: str
    recipe: Recipe
    first_step: int


class Sink(Protocol):
    """One run of a library that shows metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one step."""

    def close(self) -> None:
        """Everything is written."""


class TensorBoard:
    """Event files below <run>/tensorboard: `tensorboard --logdir <run>/tensorboard`."""

    def __init__(self, track: Track) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # steps from the first one on are of an attempt that was cut off
        self._writer = SummaryWriter(track.folder / "tensorboard" / track.name, purge_step=track.first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """Trackio's local store, a project named after the recipe: `trackio show`."""

    def __init__(self, track: Track) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):  # it would break the bars
            self._run = trackio.init(
                project=track.recipe.name,
                name=f"{track.folder.name}-{track.name}-{track.id}",
                group=track.folder.name,
                config=to_dict(track.recipe),
                resume="allow",
                embed=False,
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        from trackio import context_vars

        with redirect_stdout(io.StringIO()):
            self._run.finish()
        context_vars.current_run.set(None)  # it would be finished once more, and told, when the process ends


class Wandb:
    """Offline runs below <run>/wandb, for `wandb sync`; the variable WANDB_MODE=online sends them at once."""

    def __init__(self, track: Track) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=track.recipe.name,
            group=track.folder.name,
            name=track.name,
            id=f"{track.folder.name}-{track.name}-{track.id}",
            config=to_dict(track.recipe),
            dir=track.folder,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        # a resumed stage repeats steps, which W&B's own counter would refuse
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Track], Sink]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}

_listener: ContextVar[Callable[[Mapping[str, Any]], None] | None] = ContextVar("sinks", default=None)


def check(recipe: Recipe) -> None:
    """Raises a UserError where a sink's package is not installed."""
    for name in recipe.sinks:
        optional.check_installed(name, f"sinks: {name}")


def send(row: Mapping[str, Any]) -> None:
    """Gives one line of metrics.jsonl to the sinks of the stage that runs; nothing outside of a `listening` block."""
    hear = _listener.get()
    if hear is not None:
        hear(row)


@contextmanager
def listening(recipe: Recipe, stage: Path) -> Iterator[None]:
    """Inside the block the recipe's sinks get what `send` is given, as metrics of the stage in the folder `stage`."""
    opened: dict[tuple[str, str], Sink | None] = {}  # None: it failed

    def try_to(sink: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # whatever a library raises, the training goes on
            notices.warn(f"sink {sink}", f"{sink} gets no more metrics: {type(error).__name__}: {error}")
            opened.update((key, None) for key in opened if key[0] == sink)
            return None

    def hear(row: Mapping[str, Any]) -> None:
        part, step = str(row.get("part", "")), int(row.get("step", 0))
        numbers = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
        }
        name = f"{stage.name}-{part}" if part else stage.name
        for sink in recipe.sinks:
            if (sink, name) not in opened:
                track = Track(stage.parent, name, _id_of(stage, name), recipe, step)
                failed = any(each is None for (other, _), each in opened.items() if other == sink)
                opened[sink, name] = None
                if not failed:
                    opened[sink, name] = try_to(sink, partial(SINKS[sink], track))
            target = opened[sink, name]
            if target is not None:
                try_to(sink, partial(target.log, step, numbers))

    token = _listener.set(hear)
    try:
        yield
    finally:
        _listener.reset(token)
        for (sink, _), target in list(opened.items()):
            if target is not None:
                try_to(sink, target.close)


def _id_of(stage: Path, name: str) -> str:
    """The id of the runs of a part, the same as long as the stage goes on."""
    path = stage / IDS
    known = files.read_json(path) if path.is_file() else {}
    if name not in known:
        known[name] = secrets.token_hex(3)
        files.write_json(path, known)
    return str(known[name])
