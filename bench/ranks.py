"""The stages of a run of one process beside those of a run of several.

    python -m training run tiny --run runs/one parallel.processes=1
    python -m training run tiny --run runs/two parallel.processes=2
    python -m bench ranks runs/one runs/two --out bench/results/cpu/ranks.json

Beside them stands what the machine allows: optimizer steps of the recipe's base in one process alone, and in as many processes as
the second run has at the same time, which share nothing.
"""

from __future__ import annotations

import multiprocessing
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

from . import pipeline
from .table import Table

STEPS = 20  # of a process that measures what the machine allows
WARM = 3


def of_run(folder: Path) -> dict[str, Any]:
    """Processes and seconds of the stages of a finished run."""
    recipe, done = pipeline.finished(RunDir(folder))
    seconds = {name: round(record["stage_seconds"], 1) for name, record in done.items()}
    return {"recipe": recipe.name, "processes": recipe.parallel.processes, "stage_seconds": seconds}


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


def measure(one: Path, more: Path) -> dict[str, Any]:
    runs = [of_run(one), of_run(more)]
    recipe = RunDir(one).read_recipe()
    return {"runs": runs, "unshared_step_seconds": [unshared(recipe, run["processes"]) for run in runs]}


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
