"""Arguments that several commands share."""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from training.config import field_types, unknown
from training.errors import UserError
from training.recipe import Recipe
from training.run_dir import RunDir

CRITICS = ("judge", "reward_models")


def add_run(parser: argparse.ArgumentParser) -> None:
    """--run DIR, the folder of a run that exists."""
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/tiny"),
        metavar="DIR",
        help="folder of the run (default: runs/tiny)",
    )


def add_out(parser: argparse.ArgumentParser, text: str) -> None:
    """--out FILE, which may exist; a folder is refused."""
    parser.add_argument("--out", type=_file, metavar="FILE", help=text)


def _file(word: str) -> Path:
    if Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, {word} is a folder")
    return Path(word)


def between(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """The `type` of an option: an int or float from `least` to `most`."""
    wanted = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"

    def read(word: str) -> float:
        try:
            value: float = kind(word)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {noun}, {wanted}, got {word!r}")
        return value

    return read


def with_stage(word: str, stage: str) -> str:
    """A key=value word in which the stage may be left out: lr=1e-5 of zero is zero.lr=1e-5."""
    first = re.split("[.=]", word)[0]
    shared, own = field_types(Recipe), field_types(field_types(Recipe)[stage])
    if "=" in word and first not in shared and first not in own:
        raise unknown("key", first, [*shared, *own])
    return word if first in shared or first not in own else f"{stage}.{word}"


def task_of(data: str) -> str:
    """The task that a --data word means: a file of Parquet or JSON lines, or a task as recipes name it, "hf:openai/gsm8k"."""
    from training.tasks import names

    if data.partition(":")[0] in names():
        return data
    return f"parquet:{data}" if data.endswith(".parquet") else f"jsonl:{data}"


def existing_run(path: Path) -> RunDir:
    """The run in the folder `path`; a UserError where there is none."""
    run_dir = RunDir(path)
    run_dir.read_recipe()
    return run_dir


def checkpoints(run_dir: RunDir) -> dict[str, Path]:
    """Every checkpoint of a run by name ("zero", "distill-llama"), in the order of the pipeline."""
    found: dict[str, Path] = {}
    for stage in run_dir.read_recipe().stages:
        found |= run_dir.stage(stage).checkpoints()
    return found


def checkpoint(run_dir: RunDir, name: str | None) -> tuple[str, Path]:
    """Name and folder of a checkpoint that answers questions; without a name the policy that was trained last, or
    where there is none the last student.

    Raises:
        UserError: there is none of that name, or it judges responses and gives none.
    """
    found = checkpoints(run_dir)
    if name is None and (name := _last_policy(found)) is None:
        raise UserError(f"{run_dir.path} has no checkpoint yet")
    if name not in found:
        has = ", ".join(found) or "none yet"
        raise UserError(f"unknown checkpoint {name!r}: {run_dir.path} has {has}")
    if name.split("-")[0] in CRITICS:
        raise UserError(f"{name} judges responses and gives none: choose another checkpoint")
    return name, found[name]


def last_checkpoint(run_dir: RunDir) -> Path | None:
    """Folder of the checkpoint that `checkpoint` takes without a name; None where there is none."""
    found = checkpoints(run_dir)
    name = _last_policy(found)
    return None if name is None else found[name]


def _last_policy(found: Iterable[str]) -> str | None:
    answering = [name for name in found if name.split("-")[0] not in CRITICS]
    policies = [name for name in answering if not name.startswith("distill-")] or answering
    return policies[-1] if policies else None
