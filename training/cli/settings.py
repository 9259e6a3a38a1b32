"""`settings`: every setting of a recipe in one table."""

import argparse

from training.settings import page


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `settings`."""
    parser = subparsers.add_parser("settings", help="every setting with its default, as Markdown")
    parser.set_defaults(run_command=run_command)


def run_command(arguments: argparse.Namespace) -> None:
    """Prints the page that docs/settings.md holds."""
    print(page(), end="")
