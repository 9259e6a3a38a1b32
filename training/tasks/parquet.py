"""Problems from a Parquet file, such as "parquet:data/train.parquet"; what a row holds: training.tasks.rows."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from training import optional
from training.errors import UserError
from training.tasks.rows import Row, RowsTask


class ParquetTask(RowsTask):
    """The problems of one file. path: of the file. Options: see RowsTask."""

    def __init__(self, path: str, test_share: float = 0.1, columns: Mapping[str, str] | None = None) -> None:
        super().__init__(f"parquet:{path}", path, _rows(path), test_share, columns)


def _rows(path: str) -> Iterator[Row]:
    parquet = optional.load("pyarrow.parquet", f"task parquet:{path}")
    if not Path(path).is_file():
        raise UserError(f"{path}: cannot be read: there is no such file")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # what pyarrow raises is one of these
        raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    return (Row(f"row {number}", partial(filled, row)) for number, row in enumerate(rows, 1))


def filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that have a value: a column has a place for every row."""
    return {name: value for name, value in row.items() if value is not None}
