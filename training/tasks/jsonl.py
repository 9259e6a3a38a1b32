"""Problems from a file of JSON lines, such as "jsonl:data/problems.jsonl"; what a line holds: training.tasks.rows."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.tasks.rows import Row, RowsTask


class JsonlTask(RowsTask):
    """The problems of one file. path: of the file, UTF-8. Options: see RowsTask."""

    def __init__(self, path: str, test_share: float = 0.1, columns: Mapping[str, str] | None = None) -> None:
        rows = (Row(f"line {number}", partial(json_object, line)) for number, line in json_lines(path))
        super().__init__(f"jsonl:{path}", path, rows, test_share, columns)


def json_lines(path: str | Path) -> list[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def json_object(line: bytes) -> dict[str, Any]:
    """The object of one line; ValueError where it is none."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, one per line: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}: one object per line")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
