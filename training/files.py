"""Files that are whole or not there: atomic writes, hashes, and faults of the disk told in one clear line."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training import notices
from training.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextlib.contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turns a full disk or a refused write on `path` into a `UserError`; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors reports operating-system errors as text inside its own exception.
        number = getattr(error, "errno", None)
        number = number or next((code for code in FULL if f"os error {code}" in str(error)), None)
        if number in FULL:
            raise UserError(
                f"{path}: no room to write ({_free(path)} free on that disk); what was there before is untouched: "
                "make room and run the same command again"
            ) from error
        if number in REFUSED:
            raise UserError(f"{path}: may not be written ({os.strerror(number)})") from error
        raise


def _free(path: Path) -> str:
    folder = path
    while not folder.exists():
        folder = folder.parent
    return readable_bytes(shutil.disk_usage(folder).free)


def readable_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well it is fsynced and takes the place of `path`.

    The block writes a file or makes a folder at the temporary path. After an error, or a kill at any moment, `path`
    is what it was before. A file never takes the place of a folder.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        try:
            yield temporary
            sync(temporary)
            if path.is_dir() and not temporary.is_dir():
                raise UserError(f"{path}: expected a file, it is a folder")
            if path.is_dir():
                # A folder cannot be renamed over a full one: the old one steps aside for one moment.
                aside = path.with_name(f".{path.name}.old")
                remove(aside)
                path.rename(aside)
                temporary.rename(path)
                remove(aside)
            else:
                os.replace(temporary, path)
            sync(path.parent, deep=False)
        except BaseException:
            remove(temporary)
            raise


def remove(path: Path) -> None:
    """Removes a file or a folder with all in it; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path, deep: bool = True) -> None:
    """Forces a file, or a folder with what it holds, to the disk."""
    targets = [path, *(path.rglob("*") if deep and path.is_dir() else ())]
    for target in targets:
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_number) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file; a broken one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def json_line(row: Any) -> str:
    """One line of a JSONL file, with its line end; tensors and NumPy values of one element become numbers."""
    return json.dumps(row, ensure_ascii=False, default=_number) + "\n"


def _number(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON value per line, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json_line(row))


def read_jsonl(path: Path, growing: bool = False) -> list[Any]:
    """The values of a JSONL file, one per line; a broken line is a `UserError` with its number.

    growing: the file is written line by line, so that its last line may be half there, after a kill or while it is written:
        it is left out, and a warning says so.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                if growing and not line.endswith(b"\n"):
                    notices.warn(
                        f"half line {path}",
                        f"{path}, line {number}: only half of it was written; it is left out",
                    )
                    break
                raise UserError(f"{path}, line {number}: not valid JSON") from None
    return rows


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below `folder`, sorted by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
