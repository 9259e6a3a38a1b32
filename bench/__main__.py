"""The command line of the benchmarks.

python -m bench run [--quick | --tiny] [--only logprob] [--device cpu|cuda] [--out OUT.json] [--add | --resume] [--ours]
                    [--limit SECONDS]
python -m bench report OUT.json [--against OLD.json]
python -m bench compare A.json B.json
python -m bench precision [--out OUT.json]
python -m bench saved [--out OUT.json]
python -m bench mixtures [--only FAMILY] [--out OUT.json]
python -m bench prefix [--tiny] [--rounds N] [--out OUT.json]
python -m bench rollout [--tiny] [--out OUT.json]
python -m bench truncation [--tiny] [--out OUT.json]
python -m bench overhead [--only OP] [--against FOLDER] [--rounds N] [--out OUT.json]
python -m bench guard [--update]
python -m bench roofline
python -m bench documents
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    return int(given.command(given) or 0)


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
    report.set_defaults(command=lambda given: _report(given.results, given.against))
    compare = commands.add_parser("compare", help="what became faster or slower")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(command=_compare)
    precision = commands.add_parser("precision", help="errors against float64, also where one logit leads")
    precision.add_argument("--out", type=Path, default=Path("bench-results/precision.json"))
    precision.set_defaults(command=_precision)
    saved = commands.add_parser(
        "saved", help="bytes that experts keep for the backward, at the shapes of models"
    )
    saved.add_argument("--out", type=Path, default=Path("bench-results/saved.json"))
    saved.set_defaults(command=_saved)
    mixtures = commands.add_parser(
        "mixtures", help="every mixture of transformers, patched against its own code"
    )
    mixtures.add_argument(
        "--only", action="append", default=[], metavar="FAMILY", help="a family of transformers"
    )
    mixtures.add_argument("--out", type=Path, default=Path("bench-results/mixtures.json"))
    mixtures.set_defaults(command=_mixtures)
    prefix = commands.add_parser("prefix", help="a GRPO step with shared prefixes, without, and in TRL")
    prefix.add_argument("--tiny", action="store_true", help="a tiny model: does it work at all")
    prefix.add_argument("--rounds", type=int, default=5)
    prefix.add_argument("--out", type=Path, default=Path("bench-results/prefix.json"))
    prefix.set_defaults(command=_prefix)
    rollout = commands.add_parser(
        "rollout", help="tokens a second of the trainer's sampler, beside transformers' own ways"
    )
    rollout.add_argument("--tiny", action="store_true", help="tiny sizes: does it work at all")
    rollout.add_argument("--out", type=Path, default=Path("bench-results/rollout.json"))
    rollout.set_defaults(command=_rollout)
    truncation = commands.add_parser(
        "truncation", help="importance ratios of GRPO under top-p sampling, without kept sets and with them"
    )
    truncation.add_argument("--tiny", action="store_true", help="two steps: does it work at all")
    truncation.add_argument("--out", type=Path, default=Path("bench-results/truncation.json"))
    truncation.set_defaults(command=_truncation)
    overhead = commands.add_parser("overhead", help="what a call of each op costs beside its work")
    overhead.add_argument("--only", action="append", default=[], metavar="OP", help="an op")
    overhead.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout, measured in turns"
    )
    overhead.add_argument("--rounds", type=int, default=5)
    overhead.add_argument("--out", type=Path, help="a JSON file")
    overhead.set_defaults(command=_overhead)
    guard = commands.add_parser("guard", help="are the CPU kernels slower than the committed baseline")
    guard.add_argument("--update", action="store_true", help="write the baseline")
    guard.set_defaults(command=_guard)
    roofline = commands.add_parser("roofline", help="what the kernels for GPUs should take, by counting")
    roofline.set_defaults(command=_roofline)
    documents = commands.add_parser("documents", help="write the tables of README and docs anew")
    documents.set_defaults(command=_documents)
    return parser


def _precision(given: argparse.Namespace) -> None:
    from . import precision

    precision.main(given.out)


def _saved(given: argparse.Namespace) -> None:
    from . import saved

    saved.main(given.out)


def _mixtures(given: argparse.Namespace) -> int:
    from . import mixtures

    return mixtures.main(given.only, given.out)


def _prefix(given: argparse.Namespace) -> None:
    from . import prefix

    prefix.main(given.out, given.rounds, given.tiny)


def _truncation(given: argparse.Namespace) -> None:
    from . import truncation

    truncation.main(given.out, given.tiny)


def _rollout(given: argparse.Namespace) -> None:
    from . import rollout

    rollout.main(given.out, given.tiny)


def _overhead(given: argparse.Namespace) -> None:
    from . import overhead

    overhead.main(given.only, given.against, given.rounds, given.out)


def _guard(given: argparse.Namespace) -> int:
    from . import guard

    return guard.main(given.update)


def _roofline(given: argparse.Namespace) -> None:
    from . import roofline

    roofline.main()


def _documents(given: argparse.Namespace) -> None:
    from . import documents

    documents.main()


def _run(given: argparse.Namespace) -> int:
    import torch

    from . import run

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = given.out or Path("bench-results") / f"{device}.json"
    plan = run.Plan(
        device, given.only, given.quick, given.tiny, given.limit, given.add, given.resume, given.ours
    )
    code = run.main(plan, out)
    _report(out, None)
    return code


def _report(path: Path, against: Path | None) -> None:
    from . import results
    from .report import markdown, page

    record = results.load(path)
    before = results.load(against) if against else page.committed(record, RESULTS, "ops.json")
    saved = page.committed(record, RESULTS, "saved.json")
    path.with_suffix(".html").write_text(page.page(record, before, saved), encoding="utf-8")
    path.with_suffix(".md").write_text(markdown.document(record, before, saved), encoding="utf-8")
    print(markdown.terminal(record))
    print(f"{path.with_suffix('.html')}, {path.with_suffix('.md')}")


def _compare(given: argparse.Namespace) -> None:
    from training.format import align

    from . import compare, results

    table = compare.table(results.load(given.before), results.load(given.after))
    print(table.note)
    print("\n".join(align([list(table.head), *([cell.text for cell in row] for row in table.rows)])))


if __name__ == "__main__":
    sys.exit(main())
