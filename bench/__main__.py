"""The command line of the benchmarks: python -m bench COMMAND; docs/benchmarks.md tells what each command is for."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import results

Option = tuple[str, dict[str, Any]]
TINY: Option = ("--tiny", {"action": "store_true", "help": "tiny sizes: does it work at all"})
ROUNDS: Option = ("--rounds", {"type": int, "default": 5})


def _only(what: str) -> Option:
    return "--only", {"action": "append", "default": [], "metavar": what.upper(), "help": f"one {what}"}


def _path(name: str, text: str) -> Option:
    return name, {"type": Path, "help": text}


# what is done -> options; a command is a function main(**options) of its module
OTHERS: dict[str, tuple[str, list[Option]]] = {
    "run": (
        "measure, write results as JSON, and report",
        [
            ("--quick", {"action": "store_true", "help": "fewer shapes and rounds: minutes"}),
            TINY,
            _only("family or op"),
            ("--device", {"choices": ("cpu", "cuda"), "help": "default: cuda where there is one"}),
            _path("--out", "the JSON file; default bench-results/DEVICE.json"),
            ("--ours", {"action": "store_true", "help": "our backends alone, no peers"}),
            (
                "--limit",
                {"type": float, "default": math.inf, "metavar": "S", "help": "begin no case after S seconds"},
            ),
            ("--add", {"action": "store_true", "help": "keep the other cases that the JSON file holds"}),
            ("--resume", {"action": "store_true", "help": "run only the cases that the JSON file lacks"}),
        ],
    ),
    "report": (
        "results as one HTML page and as Markdown, beside the JSON",
        [
            _path("results", "a JSON file"),
            _path("--against", "older results; default: the committed ones of the device"),
        ],
    ),
    "guard": (
        "are the CPU kernels slower than the committed baseline",
        [("--update", {"action": "store_true", "help": "write the baseline"})],
    ),
    "roofline": ("what the kernels for GPUs should take, by counting", []),
    "documents": ("write the tables and pictures of README and docs", []),
}
# a command that measures: measure(**options) of its module gives what ``results.record`` completes, tables(record) shows it
MEASURED: dict[str, tuple[str, list[Option]]] = {
    "precision": ("errors against float64, also where one logit leads", []),
    "saved": ("bytes that experts keep for the backward, at the shapes of models", []),
    "mixtures": ("every mixture of transformers, patched against its own code", [_only("family")]),
    "suite": (
        "transformers' own tests of its mixtures, without and with the patch",
        [_path("tests", "the folder of the tests"), _only("family")],
    ),
    "prefix": ("a GRPO step with shared prefixes, without, and in TRL", [TINY, ROUNDS]),
    "rollout": ("tokens a second of the trainer's sampler, beside transformers' own ways", [TINY]),
    "training_memory": ("peak of a GRPO step, beside what the dry run says", [TINY]),
    "distillation": (
        "students of a finished run of tiny, by text, logits and on policy",
        [_path("run", "the folder of the run")],
    ),
    "ranks": (
        "the stages of a run of one process beside those of a run of several",
        [
            _path("one", "the folder of the run of one process"),
            _path("more", "that of the run of several"),
        ],
    ),
    "truncation": ("importance ratios of GRPO under top-p sampling, without kept sets and with them", [TINY]),
    "pipeline": (
        "the marks of whole pipeline runs",
        [("runs", {"type": Path, "nargs": "+", "help": "folders of finished runs of one recipe"})],
    ),
    "overhead": (
        "what a call of each op costs beside its work",
        [_only("op"), ROUNDS, _path("--against", "another checkout, measured in turns")],
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of r1kernels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (text, options) in {**OTHERS, **MEASURED}.items():
        command = commands.add_parser(name, help=text)
        for flag, settings in options:
            command.add_argument(flag, **settings)
        if name in MEASURED:
            command.add_argument("--out", type=Path, default=Path(f"bench-results/{name}.json"))
        command.set_defaults(command=_measured(name) if name in MEASURED else _other(name))
    compare = commands.add_parser("compare", help="what became faster or slower")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(command=_compare)
    given = vars(parser.parse_args(arguments))
    return int(given.pop("command")(**given) or 0)


def _other(name: str) -> Callable[..., Any]:
    """A module is imported when its command runs: some need much."""
    return lambda **options: importlib.import_module(f"bench.{name}").main(**options)


def _measured(name: str) -> Callable[..., int]:
    """Measure, write and show; 1 where a cell of the tables failed."""

    def command(out: Path, **options: Any) -> int:
        module = importlib.import_module(f"bench.{name}")
        record = results.record(**module.measure(**options))
        results.save(out, record)
        tables = module.tables(record)
        print("\n\n".join(table.markdown(level=2) for table in tables))
        print(out)
        return int(any(table.failed for table in tables))

    return command


def _compare(before: Path, after: Path) -> None:
    from . import report

    print(report.changes(results.load(before), results.load(after)).markdown())


if __name__ == "__main__":
    sys.exit(main())
