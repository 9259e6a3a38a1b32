"""The command line of the benchmarks; docs/benchmarks.md tells what each command is for."""

import argparse
import ast
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from . import results

# folder -> its modules whose function main or, where its tables are written, measure has the arguments of a command
COMMANDS = {
    "": "run report compare guard documents",
    "studies": "precision saved overhead mixtures suite prefix rollout truncation training_memory pipeline ranks smollm2",
    "gpu": "roofline sanitize lease",
}


def _about(*path: str) -> str:
    """The first sentence of a module, which is not imported: some need much."""
    text = Path(__file__).parent.joinpath(*path).read_text(encoding="utf-8")
    return str(ast.get_docstring(ast.parse(text))).partition("\n")[0].partition(". ")[0].rstrip(".")


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    lines, modules = [__doc__], {}
    for folder, names in COMMANDS.items():
        lines += ["", _about(folder, "__init__.py")]
        for name in names.split():
            modules[name] = ".".join(filter(None, ("bench", folder, name)))
            lines.append(f"  {name:<16} {_about(folder, f'{name}.py')}")
    chosen = _parser("python -m bench", "\n".join(lines))
    chosen.add_argument("command", choices=modules, metavar="COMMAND")
    name = chosen.parse_args(words[:1]).command
    module = importlib.import_module(modules[name])
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
