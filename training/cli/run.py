"""`run`: every stage of a recipe, and `stage`: one of them."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from training import pipeline
from training.check import check
from training.cli import plan, table
from training.cli.arguments import last_checkpoint
from training.errors import UserError
from training.format import duration
from training.parallel import launch, ranks
from training.profile import profiling
from training.progress import Progress
from training.recipe import STAGE_NAMES, Recipe, load, names
from training.report import write_report
from training.run_dir import RunDir

DEFAULT = "tiny"


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands `run` and `stage`."""
    run = subparsers.add_parser("run", help="run every stage of a recipe that is not done yet")
    run.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | key=value",
        help=f"one of {', '.join(names())} or a YAML file (default: that of the run folder, else {DEFAULT}), "
        "then settings such as zero.steps=10",
    )
    run.add_argument(
        "--run", "--run-dir", type=Path, metavar="DIR", help="folder of the run (default: runs/RECIPE)"
    )  # torchrun takes --run for the beginning of an option of its own
    run.add_argument("--dry-run", action="store_true", help="print plan, memory and cost, and run nothing")
    add_profile(run)
    add_redo(run)
    run.set_defaults(run_command=run_all)
    stage = subparsers.add_parser("stage", help="run one stage of a run")
    stage.add_argument("name", metavar="STAGE", help=f"one of {', '.join(STAGE_NAMES)}")
    stage.add_argument("words", nargs="*", metavar="key=value", help="settings such as zero.steps=10")
    stage.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the run")
    add_profile(stage)
    add_redo(stage)
    stage.set_defaults(run_command=run_one)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """--profile."""
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write where the time of a step goes to profile.txt in the folder of each stage of pretraining, SFT and RL",
    )


def add_redo(parser: argparse.ArgumentParser) -> None:
    """--redo STAGE."""
    parser.add_argument(
        "--redo",
        action="append",
        default=[],
        metavar="STAGE",
        help="throw the work of this stage away and do it again; may be given several times",
    )


def run_all(arguments: argparse.Namespace) -> None:
    """Runs what is not done, shows the marks and writes the report."""
    recipe, folder = _recipe(arguments.words, arguments.run)
    if arguments.dry_run:
        dry_run(recipe)
    else:
        with profiling(arguments.profile):
            carry_out(recipe, folder, arguments)


def dry_run(recipe: Recipe) -> None:
    """Checks the recipe and prints what it would do; nothing is written."""
    if not launch.first():
        return
    notes = check(recipe, data=recipe.model.sizes == "folder")
    print("\n".join([plan.text(recipe), *(f"note: {note}" for note in notes)]))


def carry_out(recipe: Recipe, folder: Path, arguments: argparse.Namespace) -> None:
    """Runs the stages of a recipe that are not done, shows the marks and writes the report; in as many processes as it says."""
    with in_processes(recipe, arguments.given) as joined:
        if joined:
            _carry_out(recipe, folder, arguments.redo)


@contextmanager
def in_processes(recipe: Recipe, given: Sequence[str]) -> Iterator[bool]:
    """Whether this process is one of those that carry out the command `given`: it may have started them, and then they are done."""
    recipe.parallel.processes = launch.processes(recipe)
    if recipe.parallel.processes > 1 and not launch.started():
        launch.launch(given, recipe.parallel.processes, recipe.threads)
        yield False
        return
    with launch.joined(recipe):
        yield True


def _carry_out(recipe: Recipe, folder: Path, redo: list[str]) -> None:
    run_dir, progress = RunDir(folder), Progress(quiet=not ranks.main())
    progress.say(f"recipe {recipe.name}, seed {recipe.seed}, folder {folder}")
    progress.say(table.backends(recipe))
    if ranks.world() > 1:
        progress.say(f"{ranks.world()} processes")
    began = time.monotonic()
    pipeline.run(recipe, run_dir, redo=redo, progress=progress)
    if not ranks.main():
        return
    path = write_report(run_dir)
    progress.say()
    progress.say(table.stages(run_dir))
    progress.say(f"{duration(time.monotonic() - began)} in this command; the report is {path}")
    if model := last_checkpoint(run_dir):
        progress.say(f"the model is {model}")


def run_one(arguments: argparse.Namespace) -> None:
    """Runs one stage, whose inputs must be done."""
    run_dir = RunDir(arguments.run)
    recipe = run_dir.read_recipe(arguments.words)
    with profiling(arguments.profile), in_processes(recipe, arguments.given) as joined:
        if not joined:
            return
        progress = Progress(quiet=not ranks.main())
        ran = pipeline.run(recipe, run_dir, arguments.name, redo=arguments.redo, progress=progress)
        if ran and ranks.main():
            print(table.final_metrics(run_dir.stage(arguments.name)))


def _recipe(words: list[str], folder: Path | None) -> tuple[Recipe, Path]:
    """The recipe and the folder that the words of a command mean."""
    named = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if len(named) > 1:
        raise UserError(f"expected one recipe and then key=value words, got {' '.join(named)}")
    if not named and folder is not None and (folder / "recipe.yaml").is_file():
        return RunDir(folder).read_recipe(overrides), folder
    recipe = load(named[0] if named else DEFAULT, overrides)
    return recipe, folder or Path("runs") / recipe.name
