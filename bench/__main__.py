"""The command line of the benchmarks; docs/benchmarks.md tells what each command is for."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from . import results

# folder of bench -> module, whose function main or, where its tables are written, measure has the arguments of the command
COMMANDS = {
    "": {
        "run": "measure, write results as JSON, and report",
        "report": "results as one HTML page and as Markdown, beside the JSON",
        "compare": "what became faster or slower",
        "guard": "are the CPU kernels slower than the committed baseline",
        "documents": "write the tables and pictures of README and docs",
    },
    ".studies": {
        "precision": "errors against float64, also where one logit leads",
        "saved": "bytes that experts keep for the backward, at the shapes of models",
        "overhead": "what a call of each op costs beside its work",
        "mixtures": "every mixture of transformers, patched against its own code",
        "suite": "transformers' own tests of its mixtures, without and with the patch",
        "prefix": "a GRPO step with shared prefixes, without, and in TRL",
        "rollout": "tokens a second of the trainer's sampler, beside transformers' own ways",
        "truncation": "importance ratios of GRPO under top-p sampling, without kept sets and with them",
        "training_memory": "peak of a GRPO step, beside what the dry run says",
        "pipeline": "the marks of whole pipeline runs",
        "distillation": "students of a finished run of tiny, by text, logits and on policy",
        "ranks": "the stages of a run of one process, and each of them done again in several",
        "smollm2": "keep what a finished run of SmolLM2 learnt",
    },
    ".gpu": {
        "roofline": "what the kernels for GPUs should take, by counting",
        "sanitize": "every op on every backend, for compute-sanitizer",
        "lease": "what a first machine with a GPU is asked beside tests and benchmarks",
    },
}


def module_of(command: str) -> Any:
    """The module of a command; some need much: only what is asked for is imported."""
    (folder,) = (folder for folder, known in COMMANDS.items() if command in known)
    return importlib.import_module(f"bench{folder}.{command}")


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    lines = [__doc__]
    for folder, known in COMMANDS.items():
        lines += ["", *str(importlib.import_module(f"bench{folder}").__doc__).splitlines()[:1]]
        lines += [f"  {name:<16} {text}" for name, text in known.items()]
    chosen = _parser("python -m bench", "\n".join(lines))
    names = [name for known in COMMANDS.values() for name in known]
    chosen.add_argument("command", choices=names, metavar="COMMAND")
    name = chosen.parse_args(words[:1]).command
    module = module_of(name)
    parser = _parser(f"python -m bench {name}", module.__doc__)
    if not hasattr(module, "tables"):
        _add_arguments(parser, module.main)
        return int(module.main(**vars(parser.parse_args(words[1:]))) or 0)
    _add_arguments(parser, module.measure)
    parser.add_argument("--out", type=Path, default=Path(f"bench-results/{name}.json"))
    return _measured(module, **vars(parser.parse_args(words[1:])))


def _parser(program: str, text: str | None) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=program, description=text, formatter_class=form)


def _add_arguments(parser: argparse.ArgumentParser, function: Callable[..., object]) -> None:
    """A parameter without a default is an argument, one with a default an option; of a Sequence there are several."""
    types = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        kind = types[name]
        if NoneType in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        form, parts = typing.get_origin(kind), typing.get_args(kind)
        settings: dict[str, Any] = {"type": parts[0] if parts else kind}
        if form is typing.Literal:
            settings = {"choices": parts}
        if parameter.default is parameter.empty:
            parser.add_argument(name, nargs="+" if form is Sequence else None, **settings)
        elif kind is bool:
            parser.add_argument(f"--{name}", action="store_true")
        elif form is Sequence:
            parser.add_argument(f"--{name}", action="append", default=[], **settings)
        else:
            parser.add_argument(f"--{name}", default=parameter.default, **settings)


def _measured(module: Any, out: Path, **options: Any) -> int:
    """Measure, write and show; 1 where a cell of the tables failed."""
    record = results.record(**module.measure(**options))
    results.save(out, record)
    tables = module.tables(record)
    print("\n\n".join(table.markdown(level=2) for table in tables))
    print(out)
    return int(any(table.failed for table in tables))


if __name__ == "__main__":
    sys.exit(main())
