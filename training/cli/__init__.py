"""The command line: one file a command; a `UserError` is one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Sequence

from training import notices
from training.cli import chat, evaluate, export, report, review, run, samples, settings, single
from training.errors import UserError
from training.parallel import launch

COMMANDS = (run, single, report, samples, chat, evaluate, export, review, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a mistake of the user, 130 when stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m training", description="Every stage of the DeepSeek-R1 pipeline, on any machine."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes the words of a command in one piece only; those after an option come back as the rest.
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words += rest
    arguments.given = list(sys.argv[1:] if argv is None else argv)
    try:
        with notices.listening(_warn):
            arguments.run_command(arguments)
    except UserError as error:
        if launch.speaks():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if launch.speaks():
            print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:  # a bug, whose traceback one rank shows
        if launch.speaks():
            raise
        return 1
    return 0


def _warn(kind: str, text: str) -> None:
    if launch.first():
        print(f"warning: {text}", file=sys.stderr)
