"""The command line of the benchmarks: python -m bench COMMAND; docs/benchmarks.md tells what each command is for."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Option = tuple[str, dict[str, Any]]
TINY: Option = ("--tiny", {"action": "store_true", "help": "tiny sizes: does it work at all"})
ROUNDS: Option = ("--rounds", {"type": int, "default": 5})


def _only(what: str) -> Option:
    return "--only", {"action": "append", "default": [], "metavar": what.upper(), "help": f"one {what}"}


# command, which is a module -> what it does, and its options beside --out
MODULES: dict[str, tuple[str, tuple[Option, ...]]] = {
    "precision": ("errors against float64, also where one logit leads", ()),
    "saved": ("bytes that experts keep for the backward, at the shapes of models", ()),
    "mixtures": ("every mixture of transformers, patched against its own code", (_only("family"),)),
    "suite": (
        "transformers' own tests of its mixtures, without and with the patch",
        (("tests", {"type": Path, "help": "the folder of the tests"}), _only("family")),
    ),
    "prefix": ("a GRPO step with shared prefixes, without, and in TRL", (TINY, ROUNDS)),
    "rollout": ("tokens a second of the trainer's sampler, beside transformers' own ways", (TINY,)),
    "training_memory": ("peak of a GRPO step, beside what the dry run says", (TINY,)),
    "distillation": (
        "students of a finished run of tiny, by text, logits and on policy",
        (("run", {"type": Path, "help": "the folder of the run"}),),
    ),
    "truncation": (
        "importance ratios of GRPO under top-p sampling, without kept sets and with them",
        (TINY,),
    ),
    "overhead": (
        "what a call of each op costs beside its work",
        (
            _only("op"),
            ROUNDS,
            ("--against", {"type": Path, "metavar": "FOLDER", "help": "another checkout, measured in turns"}),
        ),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    given = vars(_parser().parse_args(arguments))
    return int(given.pop("command")(**given) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of r1kernels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure, write results as JSON, and report")
    run.add_argument("--quick", action="store_true", help="fewer shapes and rounds: minutes")
    run.add_argument("--tiny", action="store_true", help="every op at a tiny shape: does it work at all")
    run.add_argument("--only", action="append", default=[], metavar="NAME", help="a family or an op")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument("--out", type=Path, help="the JSON file; default bench-results/DEVICE.json")
    run.add_argument("--ours", action="store_true", help="our backends alone, no peers")
    run.add_argument(
        "--limit", type=float, default=math.inf, metavar="S", help="begin no case after S seconds"
    )
    kept = run.add_mutually_exclusive_group()
    kept.add_argument("--add", action="store_true", help="keep the other cases that the JSON file holds")
    kept.add_argument("--resume", action="store_true", help="run only the cases that the JSON file lacks")
    run.set_defaults(command=_run)
    report = commands.add_parser("report", help="results as one HTML page and as Markdown, beside the JSON")
    report.add_argument("results", type=Path)
    report.add_argument(
        "--against", type=Path, help="older results; default: the committed ones of the device"
    )
    report.set_defaults(command=_report)
    compare = commands.add_parser("compare", help="what became faster or slower")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(command=_compare)
    guard = commands.add_parser("guard", help="are the CPU kernels slower than the committed baseline")
    guard.add_argument("--update", action="store_true", help="write the baseline")
    guard.set_defaults(command=_module("guard"))
    for name, text in (
        ("roofline", "what the kernels for GPUs should take, by counting"),
        ("documents", "write the tables and pictures of README and docs"),
    ):
        commands.add_parser(name, help=text).set_defaults(command=_module(name))
    for name, (text, options) in MODULES.items():
        command = commands.add_parser(name, help=text)
        for flag, settings in options:
            command.add_argument(flag, **settings)
        command.add_argument("--out", type=Path, default=Path(f"bench-results/{name}.json"))
        command.set_defaults(command=_module(name))
    return parser


def _module(name: str) -> Any:
    """The main function of a module, which is imported when the command runs: some need much."""
    return lambda **options: importlib.import_module(f"bench.{name}").main(**options)


def _run(device: str | None, out: Path | None, **options: Any) -> int:
    import torch

    from . import run

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = out or Path("bench-results") / f"{device}.json"
    code = run.main(run.Plan(device, **options), out)
    _report(out, None)
    return code


def _report(results: Path, against: Path | None) -> None:
    from .report import write

    write(results, against, RESULTS)


def _compare(before: Path, after: Path) -> None:
    from training.format import align

    from . import compare, results

    table = compare.table(results.load(before), results.load(after))
    print(table.note)
    print("\n".join(align([list(table.head), *([cell.text for cell in row] for row in table.rows)])))


if __name__ == "__main__":
    sys.exit(main())
