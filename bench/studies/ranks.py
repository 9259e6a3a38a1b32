"""The stages of a run of one process, and each of them done again in several.

    python -m training run tiny --run runs/one parallel.processes=1
    python -m bench ranks runs/one 2 --out bench/results/cpu/ranks.json

A stage is done again from what the run's stages before it have made: sums of several processes differ in their last bits, so that
of two whole runs the later stages would have other data. Beside them stands what the machine allows: optimizer steps of the
recipe's base in one process alone, and in as many processes at the same time, which share nothing.
"""

import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training import corpus
from training.encoder import Encoder
from training.loops.batch import Row, lay_out, state_logprobs
from training.model import build_model
from training.recipe import Recipe
from training.run_dir import RunDir
from training.tokenizer import build_tokenizer

from ..table import Table
from . import pipeline

STEPS = 20  # of a process that measures what the machine allows
WARM = 3


def of_run(folder: Path) -> dict[str, Any]:
    """Processes and seconds of the stages of a finished run."""
    recipe, done = pipeline.finished(RunDir(folder))
    seconds = {name: round(record["stage_seconds"], 1) for name, record in done.items()}
    return {"recipe": recipe.name, "processes": recipe.parallel.processes, "stage_seconds": seconds}


def again(run: Path, stage: str, processes: int) -> float:
    """Seconds of a stage of a finished run, done again in so many processes in a copy of its folder."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(run, copy)
        words = ["stage", stage, "--run", str(copy), "--redo", stage, f"parallel.processes={processes}"]
        subprocess.run([sys.executable, "-m", "training", *words], check=True, stdout=sys.stderr)
        record = RunDir(copy).stage(stage).record()
    assert record is not None
    return round(record["stage_seconds"], 1)


def unshared(recipe: Recipe, processes: int) -> float:
    """Seconds of a step of the slowest of so many processes that do the same at once, each for itself."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(processes), context.SimpleQueue()
    children = [context.Process(target=_steps, args=(recipe, barrier, times)) for _ in range(processes)]
    for child in children:
        child.start()
    found = [times.get() for _ in children]
    for child in children:
        child.join()
    return float(max(found))


def _steps(recipe: Recipe, barrier: Any, times: Any) -> None:
    torch.set_num_threads(recipe.threads)
    tokenizer = build_tokenizer()
    model, config = build_model(recipe.model, tokenizer, recipe.seed), recipe.base
    documents = corpus.documents(recipe.seed, config.batch_size, mix=config.corpus)
    encoder = Encoder(model, tokenizer)
    texts = [tuple(encoder.document(each.text)) for each in documents]
    batch = lay_out([Row(each, 1, each[1:]) for each in texts], 0, model.device, shared=True)
    for step in range(WARM + STEPS):
        if step == WARM:
            barrier.wait()
            began = time.perf_counter()
        state_logprobs(model, batch).mean().backward()
        model.zero_grad()
    times.put((time.perf_counter() - began) / STEPS)


def measure(run: Path, processes: int) -> dict[str, Any]:
    one, recipe = of_run(run), RunDir(run).read_recipe()
    seconds = {stage: again(run, stage, processes) for stage in one["stage_seconds"]}
    return {
        "runs": [one, {**one, "processes": processes, "stage_seconds": seconds}],
        "unshared_step_seconds": [unshared(recipe, count) for count in (one["processes"], processes)],
    }


def tables(record: Mapping[str, Any]) -> list[Table]:
    """A row a stage and one for all of them; above, what the machine allows."""
    one, more = record["runs"]
    step, together = record["unshared_step_seconds"]
    count = more["processes"]
    note = (
        f"{count} processes that do the same work at the same time, each for itself, take {together / step:.2f} times as long for it "
        f"as one alone: on this machine such work cannot take less than {100 * together / step / count:.0f} % of its time."
    )
    rows = [(name, alone, more["stage_seconds"][name]) for name, alone in one["stage_seconds"].items()]
    rows.append(("all", *(sum(run["stage_seconds"].values()) for run in (one, more))))
    head = (f"stage of `{one['recipe']}`", "1 process", f"{count} processes", "share")
    cells = [
        [name, f"{alone:.0f} s", f"{shared:.0f} s", f"{100 * shared / alone:.0f} %"]
        for name, alone, shared in rows
    ]
    return [Table("Stages", head, cells, note)]
