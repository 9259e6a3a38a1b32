"""Files that a person brings: data ("jsonl:<path>", "parquet:<path>", "hf:<folder>"), tasks and rewards ("python:<file>:<name>").

They count by what they hold: their hashes are among the settings that decide the result of a stage. Code counts with the files
beside it that it imports by name, and those that these import.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
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
    if name not in functions and name in _other_names(tree):
        raise UserError(
            f"{spec}: expected a function that {path} defines itself, `def {name}(sample):` or `def {name}(samples):`; {name!r} "
            "is something else there, as a lambda, an object or an import: a function that calls it will do"
        )
    if name not in functions:
        raise unknown(f"function of {path}", name, functions)
    arguments = functions[name].args
    first, *more = [each.arg for each in (*arguments.posonlyargs, *arguments.args)] or [""]
    if first not in ("sample", "samples") or len(more) > len(arguments.defaults):
        raise UserError(
            f"{spec}: expected a function of `sample` (one) or `samples` (all of a step), got one of {first!r}"
        )
    return first


def _other_names(tree: ast.Module) -> set[str]:
    """What a file imports, assigns or defines at its top, not as a plain function, by name."""
    found: set[str] = set()
    for each in tree.body:
        if isinstance(each, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in each.names}
        elif isinstance(each, ast.Assign | ast.AnnAssign):
            targets = each.targets if isinstance(each, ast.Assign) else [each.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(each, ast.ClassDef | ast.AsyncFunctionDef):
            found.add(each.name)
    return found


def hashes(specs: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of every file or folder, by the name under which a recipe has it."""
    found = {}
    for spec, path in sorted(specs.items()):
        try:
            if path.is_dir():
                found[spec] = files.value_hash(files.folder_hashes(path))
            else:
                imported = _imports(path) if spec.startswith(PYTHON) else {}
                own = files.file_hash(path)
                found[spec] = files.value_hash({"": own, **imported}) if imported else own
        except OSError as error:
            raise UserError(f"{spec}: {path} cannot be read: {error.strerror}") from None
    return found


def _imports(path: Path) -> dict[str, str]:
    """Place in the folder of a file of code -> SHA-256, of every file there that it or one of these imports."""
    folder = path.parent
    found: dict[str, str] = {}
    unread = [path]
    while unread:
        for each in _beside(folder, unread.pop()):
            place = each.relative_to(folder).as_posix()
            if place not in found and each != path:
                found[place] = files.file_hash(each)
                unread.append(each)
    return found


def _beside(folder: Path, path: Path) -> Iterator[Path]:
    """The files in a folder that a file below it imports by the names of modules; packages with all that they hold."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError):  # said where it is loaded
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            top = folder / name.split(".")[0]
            if top.with_suffix(".py").is_file():
                yield top.with_suffix(".py")
            elif top.is_dir():
                yield from sorted(top.rglob("*.py"))


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
