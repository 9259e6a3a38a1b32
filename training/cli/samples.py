"""`samples`: what the model wrote, with every reward, in the terminal."""

import argparse
import textwrap
from collections.abc import Mapping
from typing import Any

from training.cli.arguments import add_run, between, existing_run
from training.config import unknown
from training.errors import UserError
from training.recipe import STAGE_NAMES


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `samples`."""
    parser = subparsers.add_parser("samples", help="show sampled responses with their rewards")
    parser.add_argument(
        "stage",
        nargs="?",
        help=f"one of {', '.join(STAGE_NAMES)} (default: the last that has samples)",
    )
    add_run(parser)
    parser.add_argument("--count", type=between(int, 1), default=6, metavar="N", help="how many (default: 6)")
    parser.add_argument(
        "--step", type=between(int, 0), metavar="N", help="only those of this step (default: the latest ones)"
    )
    parser.add_argument("--sort", choices=("time", "best", "worst"), default="time", help="which come first")
    parser.set_defaults(run_command=run_command)


def run_command(arguments: argparse.Namespace) -> None:
    """Prints the samples."""
    run_dir = existing_run(arguments.run)
    if arguments.stage is not None and arguments.stage not in STAGE_NAMES:
        raise unknown("stage", arguments.stage, STAGE_NAMES)
    for name in [arguments.stage] if arguments.stage else reversed(STAGE_NAMES):
        rows = run_dir.stage(name).samples()
        if rows:
            break
    if arguments.step is not None:
        rows = [row for row in rows if row.get("step") == arguments.step]
    if not rows:
        where = "" if arguments.step is None else f" of step {arguments.step}"
        raise UserError(f"{run_dir.path} has no samples{where} of {arguments.stage or 'any stage'}")
    if arguments.sort == "time":
        rows = rows[::-1]
    else:
        rows.sort(key=earned, reverse=arguments.sort == "best")
    print("\n\n".join(text(name, row) for row in rows[: arguments.count]))


def earned(row: Mapping[str, Any]) -> float:
    """The reward of a sample; where it took part in no training, the sum of its rewards."""
    if row.get("reward") is not None:
        return float(row["reward"])
    return sum(value or 0.0 for value in (row.get("rewards") or {}).values())


def text(stage: str, row: Mapping[str, Any]) -> str:
    """One sample as lines: where it is from, the question, the response, the rewards."""
    head = [
        stage,
        *(
            f"{name} {row[name]}"
            for name in ("step", "checkpoint", "split", "language")
            if row.get(name) is not None
        ),
    ]
    facts = [f"{name} {value:g}" for name, value in (row.get("rewards") or {}).items() if value is not None]
    for name in ("reward", "advantage"):
        if row.get(name) is not None:
            facts.append(f"{name} {row[name]:.3g}")
    if row.get("finished") is False:
        facts.append("cut off")
    body = [
        textwrap.fill(str(row.get(name, "")), 100, initial_indent="  ", subsequent_indent="  ")
        for name in ("question", "text")
    ]
    end = [f"  = {', '.join(facts)}"] if facts else []
    return "\n".join([" | ".join(head), body[0], "  ->", body[1], *end])
