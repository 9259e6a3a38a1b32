"""The folder of a run: one folder a stage, written so that a kill at any moment loses nothing.

    <run>/recipe.yaml            the resolved recipe
    <run>/<stage>/started.json   settings and inputs of the work under way
                  metrics.jsonl  one line a step             (append-only)
                  samples.jsonl  decoded samples             (append-only)
                  warnings.jsonl what a person should know   (where there is something)
                  profile.txt    where a step's time goes    (training.profile), where it was asked for
                  state.json, state-<0 or 1>/                the resume point, while the stage runs
                  sinks.json     ids of the stage's runs in other libraries  (training.sinks), where there are sinks
                  pieces/        responses drawn so far      (training.pieces), while the stage runs
                  parts/<part>/  files of a model under way  (training.parts), of a stage that trains several
                  checkpoint*/, *.jsonl ...                  what the stage makes: its outputs
                  lineage.json   parents, hashes, settings, versions
                  done.json      written last: hashes of the outputs, final metrics

Fields that may differ between two equal runs end in `_seconds` or `_per_second`; everything else is the same bit
for bit. Of several ranks, the first one writes.
"""

import contextlib
import fcntl
import os
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from training import files, lineage, sinks
from training.errors import UserError
from training.parallel import ranks, saved
from training.recipe import STAGE_NAMES, Recipe, load, to_dict

APPEND_ONLY = ("metrics.jsonl", "samples.jsonl")
PROFILE = "profile.txt"
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # PyYAML in C, where it was built so
_WARNINGS = "warnings.jsonl"
_TENSOR_FOLDERS = ("state-0", "state-1")  # taken in turn, so that one is always whole
_PIECES = "pieces"
_PARTS = "parts"
# what a person was asked and said; see training.cli.review
REVIEW_FILES = (
    "unreviewed.jsonl",
    "review.jsonl",
)
_BOOKKEEPING = (
    *APPEND_ONLY,
    *_TENSOR_FOLDERS,
    *REVIEW_FILES,
    PROFILE,
    _WARNINGS,
    _PIECES,
    _PARTS,
    sinks.IDS,
    "started.json",
    "state.json",
    "lineage.json",
    "done.json",
)


@dataclass(frozen=True)
class State:
    """A resume point: the step it was taken after, JSON counters, and a folder of named tensors."""

    step: int
    counters: dict[str, Any]
    folder: Path

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, whole, on the CPU."""
        return saved.read(self.folder)

    @cached_property
    def described(self) -> dict[str, torch.Tensor]:
        """All of them without memory: shapes and dtypes."""
        return saved.described(self.folder)

    def read_into(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fills the tensors of some names, which may be divided among ranks; every rank calls it."""
        saved.read_into(self.folder, tensors)


class StageDir:
    """The files of one stage."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._began = self._saved = time.monotonic()
        self._seconds_before = 0.0

    # What a stage writes while it runs

    def log(self, **metrics: Any) -> None:
        """Appends one line to metrics.jsonl, and gives it to the sinks of the run."""
        self.append("metrics.jsonl", [metrics])
        if ranks.main():
            sinks.send(metrics)

    def add_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to samples.jsonl."""
        self.append("samples.jsonl", rows)

    def add_warning(self, kind: str, text: str) -> bool:
        """Keeps a warning in warnings.jsonl, once for its kind; False where it was there, from before a kill too."""
        rows = self.warnings()
        if any(row["kind"] == kind for row in rows) or not ranks.main():
            return False
        files.write_jsonl(self.path / _WARNINGS, [*rows, {"kind": kind, "text": text}])
        return True

    def append(self, name: str, rows: Iterable[Any]) -> None:
        """Appends rows to a file of lines."""
        if not ranks.main():
            return
        path = self.path / name
        lines = "".join(files.json_line(row) for row in rows)
        with files.disk_faults(path), path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def data(self, name: str) -> Path:
        """The path of a data file of this stage."""
        return self.path / name

    def piece(self, name: str) -> Path:
        """The path of a file that is kept until the stage is done, for a run that goes on."""
        return self.path / _PIECES / name

    def folder_of(self, part: str) -> Path:
        """The folder of a part of the stage while it is under way."""
        return self.path / _PARTS / part

    def has_data(self, name: str) -> bool:
        """Whether a data file of this stage is there."""
        return ranks.once(self.data(name).is_file)

    @ranks.by_main
    def write_data(self, name: str, rows: Iterable[Any]) -> Path:
        """Writes a JSONL data file atomically and returns its path."""
        files.write_jsonl(self.data(name), rows)
        return self.data(name)

    # What others read

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, behind them those of parts under way; empty where there is none."""
        return self._of_all_parts("metrics.jsonl")

    def samples(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl, behind them those of parts under way; empty where there is none."""
        return self._of_all_parts("samples.jsonl")

    def warnings(self) -> list[dict[str, str]]:
        """Kind and text of every warning, oldest first."""
        return self.rows(_WARNINGS)

    def read_data(self, name: str) -> list[dict[str, Any]]:
        """The rows of a data file.

        Raises:
            UserError: the file is missing, or a line is broken (its number is named).
        """
        if not self.data(name).is_file():
            raise UserError(f"{self.data(name)} is missing: stage {self.name} has not made it")
        return files.read_jsonl(self.data(name))

    def _of_all_parts(self, name: str) -> list[dict[str, Any]]:
        parts = [StageDir(folder).rows(name) for folder in sorted((self.path / _PARTS).glob("*"))]
        return [*self.rows(name), *(row for rows in parts for row in rows)]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file of lines, which may be growing; empty where there is none."""
        path = self.path / name
        return files.read_jsonl(path, growing=True) if path.is_file() else []

    def checkpoints(self) -> dict[str, Path]:
        """Name -> folder of every checkpoint here: "zero" for zero/checkpoint, "distill-llama" for a suffix."""
        found = {}
        for folder in sorted(self.path.glob("checkpoint*")):
            if (folder / "config.json").is_file():
                found[self.name + folder.name.removeprefix("checkpoint")] = folder
        return found

    # Resume points

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, Any]) -> None:
        """Writes a resume point atomically: the one before stays valid until the new one is whole on the disk.

        Args:
            step: steps that are finished.
            tensors: everything that training changes (model with buffers, optimizer, reference), any device; each rank gives
                its parts of those that are divided.
            counters: JSON values.

        The lengths of metrics.jsonl and samples.jsonl are recorded with it, after their lines are on the disk.
        """
        before, folder = self._next_folder()
        with files.disk_faults(folder):
            saved.write(folder, tensors)
        self._seal_state(step, counters, before, folder)
        self._saved = time.monotonic()

    @ranks.by_main
    def _next_folder(self) -> tuple[str, Path]:
        """The name of the folder of the resume point that there is ("" for none), and an empty one for the next."""
        path = self.path / "state.json"
        before = files.read_json(path)["tensors"] if path.is_file() else ""
        folder = self.path / next(name for name in _TENSOR_FOLDERS if name != before)
        files.remove(folder)
        with files.disk_faults(folder):
            folder.mkdir()
        return before, folder

    @ranks.by_main
    def _seal_state(self, step: int, counters: Mapping[str, Any], before: str, folder: Path) -> None:
        """Makes the tensors in `folder` the resume point."""
        files.sync(folder)
        lengths = {}
        for name in APPEND_ONLY:
            appended = self.path / name
            if appended.is_file():
                files.sync(appended)
                lengths[name] = appended.stat().st_size
        body = {
            "step": step,
            "counters": dict(counters),
            "lengths": lengths,
            "elapsed_seconds": self.elapsed_seconds,
            "tensors": folder.name,
            "tensors_hash": files.value_hash(files.folder_hashes(folder)),
        }
        files.write_json(self.path / "state.json", {**body, "hash": files.value_hash(body)})
        if before:
            files.remove(self.path / before)

    def load_state(self) -> State | None:
        """The latest resume point, or None; metrics.jsonl and samples.jsonl are cut back to its lengths.

        Raises:
            UserError: the resume point, or a file it counts on, is damaged; the file is named.
        """
        body = self._resume_point()
        if body is None:
            return None
        self._seconds_before = body["elapsed_seconds"]
        self._began = time.monotonic()
        return State(body["step"], body["counters"], self.path / body["tensors"])

    @ranks.by_main
    def _resume_point(self) -> dict[str, Any] | None:
        """What state.json says, or None where there is none; what was appended behind it is cut off."""
        path = self.path / "state.json"
        if not path.is_file():
            self._truncate({})
            return None
        body: dict[str, Any] = files.read_json(path)
        expected = body.pop("hash", None) if isinstance(body, dict) else None
        if expected != files.value_hash(body):
            raise self._damaged(path)
        folder = self.path / body["tensors"]
        if files.value_hash(files.folder_hashes(folder)) != body["tensors_hash"]:
            raise self._damaged(folder)
        self._truncate(body["lengths"])
        return body

    def _truncate(self, lengths: Mapping[str, int]) -> None:
        for name in APPEND_ONLY:
            path = self.path / name
            length = lengths.get(name, 0)
            if (path.stat().st_size if path.is_file() else 0) < length:
                raise self._damaged(path)
            if path.is_file():
                os.truncate(path, length)

    def _damaged(self, path: Path) -> UserError:
        return UserError(
            f"{path} is damaged: put it back, or start stage {self.name} again with --redo {self.name}"
        )

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of work in this stage, over all its resumed parts."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def unsaved_seconds(self) -> float:
        """Seconds of work that a kill would cost: since the last resume point, by the clock of this rank."""
        return time.monotonic() - self._saved

    # Beginning and end

    def begin(self, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Prepares the folder for work: of a killed attempt stays what a run can go on from, and all else goes."""
        self._began = self._saved = time.monotonic()
        self._seconds_before = 0.0
        if not self._goes_on:
            files.remove(self.path)
        elif not (self.path / "state.json").is_file():
            self._truncate({})
        with files.disk_faults(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        files.write_json(self.path / "started.json", {"config": config, "inputs": inputs})

    @property
    def _goes_on(self) -> bool:
        """Whether there is a resume point, a piece or a part."""
        kept = [self.path / "state.json", *(self.path / _PIECES).glob("*"), *(self.path / _PARTS).glob("*")]
        return any(path.exists() for path in kept)

    def started(self) -> dict[str, Any] | None:
        """Settings and input hashes of work that can go on and is not done; None otherwise."""
        if self.record() is not None or not self._goes_on:
            return None
        path = self.path / "started.json"
        if not path.is_file():
            raise self._damaged(path)
        return dict(files.read_json(path))

    def outputs(self) -> list[Path]:
        """Every file and folder here that the stage made for others."""
        made = []
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            if path.name not in _BOOKKEEPING and not path.name.startswith("."):
                made.append(path)
        return made

    @ranks.by_main
    def finish(self, metrics: Mapping[str, Any], outputs: Sequence[Path] | None = None) -> None:
        """Records the stage as done: lineage.json, then done.json, then the resume point goes.

        Args:
            metrics: final metrics of the stage.
            outputs: files and folders that later stages may read; all that the stage made by default.
        """
        started = files.read_json(self.path / "started.json")
        hashes = self._output_hashes(self.outputs() if outputs is None else outputs)
        shared = {"config": started["config"], "inputs": started["inputs"], "outputs": hashes}
        versions = {"code": lineage.code_version(), "packages": lineage.package_versions()}
        files.write_json(self.path / "lineage.json", {"stage": self.name, **shared, **versions})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record = {
            "hash": files.value_hash(hashes),
            **shared,
            "metrics": dict(metrics),
            "stage_seconds": round(self.elapsed_seconds, 3),
            "peak_memory_bytes": peak,
        }
        files.write_json(self.path / "done.json", record)
        self.tidy()

    def tidy(self) -> None:
        """Removes what a stage under way could go on from; a kill right after its last step may have left it."""
        for name in ("state.json", *_TENSOR_FOLDERS, _PIECES, _PARTS):
            files.remove(self.path / name)

    def seal(self) -> None:
        """Renews the recorded hashes after a person changed the outputs of a finished stage on purpose."""
        hashes = self._output_hashes(self.outputs())
        for name in ("lineage.json", "done.json"):
            path = self.path / name
            record = {**files.read_json(path), "outputs": hashes, "changed_by_hand": True}
            if "hash" in record:
                record["hash"] = files.value_hash(hashes)
            files.write_json(path, record)

    def _output_hashes(self, outputs: Sequence[Path]) -> dict[str, str]:
        """Relative path -> SHA-256 of every file in `outputs`, after it is on the disk."""
        hashes: dict[str, str] = {}
        for path in outputs:
            place = path.relative_to(self.path).as_posix()
            files.sync(path)
            if path.is_dir():
                hashes |= {f"{place}/{name}": digest for name, digest in files.folder_hashes(path).items()}
            else:
                hashes[place] = files.file_hash(path)
        return hashes

    def record(self) -> dict[str, Any] | None:
        """What done.json says, or None where the stage is not done."""
        path = self.path / "done.json"
        return dict(files.read_json(path)) if path.is_file() else None

    def changed_output(self) -> str | None:
        """The first output that is missing or differs from what done.json recorded; None if all are as they were."""
        for place, digest in (self.record() or {}).get("outputs", {}).items():
            path = self.path / place
            if not path.is_file() or files.file_hash(path) != digest:
                return str(path)
        return None


class RunDir:
    """The folder of a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def stage(self, name: str) -> StageDir:
        """The folder of a stage, which need not exist."""
        return StageDir(self.path / name)

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes recipe.yaml, the resolved recipe."""
        files.write_text(
            self.path / "recipe.yaml",
            yaml.dump(to_dict(recipe), Dumper=_DUMPER, sort_keys=False, allow_unicode=True),
        )

    def read_recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe this folder was made with, with overrides.

        Raises:
            UserError: the folder is no run.
        """
        path = self.path / "recipe.yaml"
        if not path.is_file():
            raise UserError(f"{self.path} is not the folder of a run (it has no recipe.yaml)")
        return load(path, overrides)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for the ranks of this one; a second process, or a folder of something else, gets one clear line."""
        if not ranks.main():
            yield
            return
        with files.disk_faults(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path}: expected a folder, it is a file")
        # a stage clears its own folder before it writes: what is not of a run must never be taken for one
        taken = next((name for name in STAGE_NAMES if (self.path / name).exists()), None)
        if taken and not (self.path / "recipe.yaml").is_file():
            raise UserError(
                f"{self.path} holds {taken!r} and is not the folder of a run (it has no recipe.yaml): name another folder"
            )
        with files.disk_faults(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(f"{self.path} is in use by another process (process id {holder})") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
