"""Arguments that several commands share."""

import argparse
from pathlib import Path

from training.config import unknown
from training.errors import UserError
from training.run_dir import RunDir


def add_run(parser: argparse.ArgumentParser) -> None:
    """--run DIR, the folder of a run that exists."""
    parser.add_argument(
        "--run", type=Path, default=Path("runs/tiny"), help="folder of the run (default: runs/tiny)"
    )


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
    """Name and folder of a checkpoint of the run; without a name the policy that was trained last."""
    found = checkpoints(run_dir)
    if name is None:
        policies = [each for each in found if each.split("-")[0] not in ("judge", "reward_models", "distill")]
        if not policies:
            raise UserError(f"{run_dir.path} has no checkpoint yet")
        name = policies[-1]
    if name not in found:
        raise unknown("checkpoint", name, found)
    return name, found[name]
