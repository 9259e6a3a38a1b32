"""`report`: the one page about a run."""

import argparse

from training.cli.arguments import add_out, add_run, existing_run
from training.report import write_report


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `report`."""
    parser = subparsers.add_parser("report", help="write the report of a run, which may still be under way")
    add_run(parser)
    add_out(parser, "where to write it (default: report.html in the run folder)")
    parser.set_defaults(run_command=run_command)


def run_command(arguments: argparse.Namespace) -> None:
    """Writes the page and says where it is."""
    print(f"the report is {write_report(existing_run(arguments.run), arguments.out)}")
