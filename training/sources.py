"""Files that a person brings: data ("jsonl:<path>", "parquet:<path>", "hf:<folder>"), tasks and rewards ("python:<file>:<name>").

They count by what they hold: their hashes are among the settings that decide the result of a stage.
"""

import ast
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from training import files
from training.config import unknown
from training.errors import UserError

PYTHON = "python:"


def path_of(spec: str) -> Path | None:
    """The file or folder behind "jsonl:<path>", "parquet:<path>", "hf:<folder>" or "python:<file>:<name>"; None for a name of
    anything else."""
    if spec.startswith(PYTHON):
        return split(spec)[0]
    kind, _, path = spec.partition(":")
    brought = kind in ("jsonl", "parquet") or (kind == "hf" and Path(path).is_dir())
    return Path(path) if brought else None


def split(spec: str) -> tuple[Path, str]:
    """File and name of "python:<file>:<name>".

    Raises:
        UserError: it is spelt otherwise, or there is no such file.
    """
    path, _, name = spec.removeprefix(PYTHON).rpartition(":")
    if not path or not name.isidentifier():
        raise UserError(f"{spec!r}: expected python:<file>:<name>, as in python:my_task.py:MyTask")
    if not Path(path).is_file():
        raise UserError(f"{spec}: there is no file {path}")
    return Path(path), name


def argument_of(spec: str) -> str:
    """The name of the argument of a reward of one's own, "sample" or "samples", read without running the file.

    Raises:
        UserError: there is no such file or function, the file is not Python, or the function takes something else.
    """
    path, name = split(spec)
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{spec}: {path} is not Python: {error}") from None
    functions = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    if name not in functions:
        raise unknown(f"function of {path}", name, functions)
    arguments = functions[name].args
    first, *more = [each.arg for each in (*arguments.posonlyargs, *arguments.args)] or [""]
    if first not in ("sample", "samples") or len(more) > len(arguments.defaults):
        raise UserError(
            f"{spec}: expected a function of `sample` (one) or `samples` (all of a step), got one of {first!r}"
        )
    return first


def hashes(specs: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of every file or folder, by the name under which a recipe has it."""
    found = {}
    for spec, path in sorted(specs.items()):
        try:
            whole = files.folder_hashes(path) if path.is_dir() else None
            found[spec] = files.file_hash(path) if whole is None else files.value_hash(whole)
        except OSError as error:
            raise UserError(f"{spec}: {path} cannot be read: {error.strerror}") from None
    return found


def load(spec: str) -> Any:
    """The object `name` of the file in "python:<file>:<name>"; the file may import what lies beside it.

    Raises:
        UserError: there is no such file or name, or the file cannot be imported.
    """
    path, name = split(spec)
    module_name = f"brought_{files.file_hash(path)[:16]}"
    if module_name not in sys.modules:
        sys.modules[module_name] = _imported(path, module_name)
    module = sys.modules[module_name]
    if not hasattr(module, name):
        raise UserError(f"{spec}: {path} has no {name!r}")
    return getattr(module, name)


def _imported(path: Path, name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UserError(f"{path}: expected a file of Python code that ends in .py")
    module = importlib.util.module_from_spec(found)
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
        del sys.modules[name]
    return module
