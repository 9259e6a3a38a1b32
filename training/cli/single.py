"""`sft`, `grpo` and `distill`: one stage on a checkpoint and a file, without a recipe.

Each makes a recipe of one stage in memory and runs it as `run` does: the folder of the run, resume and report are the same.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.cli.arguments import task_of, with_stage
from training.cli.run import add_redo, carry_out, dry_run
from training.errors import UserError
from training.prompts import STYLES
from training.recipe import make
from training.sources import path_of


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands `sft`, `grpo` and `distill`."""
    for name, (title, data, _) in SINGLE.items():
        parser = subparsers.add_parser(name, help=title)
        parser.add_argument(
            "words", nargs="*", metavar="key=value", help="settings such as lr=1e-5 or seed=1"
        )
        role = "the teacher" if name == "distill" else "the checkpoint to start from"
        parser.add_argument(
            "--model", required=True, metavar="FOLDER", help=f"{role}; a name on Hugging Face's hub will do"
        )
        parser.add_argument("--data", required=True, metavar="FILE", help=data)
        parser.add_argument(
            "--run",
            type=Path,
            default=Path("runs") / name,
            metavar="DIR",
            help=f"folder of the run (default: runs/{name})",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="print plan, memory and cost, and run nothing"
        )
        if name == "grpo":
            parser.add_argument(
                "--prompt",
                choices=STYLES,
                default="zero",
                help="how it is asked: zero tells it the form of R1-Zero, chat is the bare question (default: zero)",
            )
        if name == "distill":
            parser.add_argument(
                "--student",
                metavar="FOLDER",
                help="the student (default: two small ones from random weights)",
            )
        add_redo(parser)
        parser.set_defaults(run_command=run_single, single=name)


def run_single(arguments: argparse.Namespace) -> None:
    """Runs the stage and writes the report."""
    path = Path(arguments.data) if arguments.single == "sft" else path_of(task_of(arguments.data))
    if path is not None and not path.exists():
        raise UserError(f"--data: there is no file {arguments.data}")
    from training.pretrained import pretrained_folder  # loads transformers

    arguments.model = str(pretrained_folder(arguments.model, "--model"))
    _, _, values = SINGLE[arguments.single]
    stage, own = values(arguments)
    shared = {
        "name": arguments.single,
        "description": f"{arguments.single} of {arguments.model} on {arguments.data}",
        "model": {"pretrained": arguments.model},
        "stages": [stage],
    }
    recipe = make({**shared, **own}, [with_stage(word, stage) for word in arguments.words])
    if arguments.dry_run:
        dry_run(recipe)
    else:
        carry_out(recipe, arguments.run, arguments)


def _sft(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    return "sft1", {"sft1": {"start": arguments.model, "data": str(arguments.data)}}


def _grpo(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    stage = {"zero": "zero", "chat": "rl_reasoning"}[arguments.prompt]
    rewards = {"accuracy": 1.0, "format": 1.0}
    return stage, {"task": [task_of(arguments.data)], stage: {"start": arguments.model, "rewards": rewards}}


def _distill(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    students = {"students": {"student": {"pretrained": arguments.student}}} if arguments.student else {}
    own = {"teacher": arguments.model, **students}
    return "distill", {"task": [task_of(arguments.data)], "distill": own}


QUESTIONS = "JSONL or Parquet of questions and answers, or a task such as hf:openai/gsm8k"

# Command -> what it does, what its data are, and its stage with the values of the recipe.
SINGLE: dict[str, tuple[str, str, Callable[[argparse.Namespace], tuple[str, dict[str, Any]]]]] = {
    "sft": (
        "next-token training of a checkpoint on traces",
        "JSONL of messages, or of question and response",
        _sft,
    ),
    "grpo": ("reinforcement learning of a checkpoint on problems", QUESTIONS, _grpo),
    "distill": (
        "a teacher answers, students learn what is right",
        QUESTIONS,
        _distill,
    ),
}
