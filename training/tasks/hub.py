"""Problems from a data set of Hugging Face's library, such as "hf:openai/gsm8k"; what a row holds: training.tasks.rows.

The library (`datasets`) reads a name on the hub, out of its cache where there is no network, a folder that `save_to_disk`
wrote, or a folder of data files. Code of a data set is never run.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from training import optional
from training.config import unknown
from training.errors import UserError
from training.tasks.parquet import filled
from training.tasks.rows import Row, RowsTask


class HubTask(RowsTask):
    """The problems of one data set; those of its split `test` are never trained on.

    dataset: a name on the hub or a folder. subset: of a data set that has several ("main" of openai/gsm8k). train, test: the
    splits that are read; where test is "" and there is no split of that name, train is split by the question. revision: of the
    hub, a commit or a tag, which pins what is read. test_share, columns: see RowsTask.
    """

    def __init__(
        self,
        dataset: str,
        subset: str = "",
        train: str = "train",
        test: str = "",
        revision: str = "",
        test_share: float = 0.1,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        name = f"hf:{dataset}"
        splits = _load(dataset, subset, revision)
        chosen = {"train": train, "test": test or ("test" if "test" in splits and train != "test" else "")}
        for split in filter(None, chosen.values()):
            if split not in splits:
                raise unknown(f"split of {name}", split, splits)
        super().__init__(name, name, _rows(splits, chosen), test_share, columns)


def _rows(splits: Mapping[str, Any], chosen: Mapping[str, str]) -> Iterator[Row]:
    # the test comes first: a question of both is of the test alone
    for split in ("test", "train"):
        if chosen[split]:
            own = split if chosen["test"] else None
            for number, row in enumerate(splits[chosen[split]]):
                yield Row(f"{chosen[split]} row {number}", partial(filled, row), own)


def _load(dataset: str, subset: str, revision: str) -> Mapping[str, Any]:
    """Split -> rows."""
    datasets = optional.load("datasets", f"task hf:{dataset}")
    folder = Path(dataset)
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            found = datasets.load_from_disk(dataset)
        else:
            found = datasets.load_dataset(dataset, subset or None, revision=revision or None)
    except Exception as error:  # its errors have many types: no network, no such name, an unread format
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"hf:{dataset} cannot be read: {lines[0]}") from None
    return found if isinstance(found, Mapping) else {"train": found}
