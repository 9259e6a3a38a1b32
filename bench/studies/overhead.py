"""What a call of each public op costs beside its work, at the shapes of r1kernels.examples, where there is next to none.

Processes take turns, since one differs from the next (where its memory lies); each calls an op in batches, on one thread, and the
shortest batch of all counts, by the CPU time of the thread. --against: the folder of another checkout with its extension built,
whose processes take turns with those of this one.
"""

import json
import os
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels import examples

LEADING = {
    "grpo_loss": 1, "linear_grpo_loss": 2, "linear_divergence": 2, "linear_topk_divergence": 2, "topk_divergence": 1,
    "group_advantages": 0, "update_router_bias": 0, "decode_attention": 0, "sample_tokens": 0,
}  # fmt: skip
"""How many of the first arguments of a sample call have a gradient, where not all floating-point ones have."""

ROOT = Path(__file__).parents[2]
PHASES = ("inference", "forward", "forward+backward")
BATCH_SECONDS = 2e-3

Times = dict[str, dict[str, float]]


def calls(batches: int, only: Sequence[str] = ()) -> Times:
    """Op -> phase -> seconds of a call, the shortest of so many batches; "forward" records for a backward. Of all ops, or some."""
    torch.set_num_threads(1)
    found: Times = {}
    for op, (args, kwargs) in examples.calls("cpu").items():
        if only and op not in only:
            continue
        leading = args[: LEADING.get(op, len(args))]
        leaves = [one.requires_grad_() for one in leading if torch.is_tensor(one) and one.is_floating_point()]
        forward = partial(getattr(r1kernels, op), *args, **kwargs)
        with torch.no_grad():
            found[op] = {"inference": _shortest(forward, batches)}
        result = _first(forward())
        if result is not None and result.requires_grad:
            both = partial(_both, forward, leaves, torch.ones_like(result))
            found[op]["forward"] = _shortest(forward, batches)
            found[op]["forward+backward"] = _shortest(both, batches)
    return found


def _first(result: Any) -> Any:
    return _first(result[0]) if isinstance(result, tuple) else result


def _both(forward: Callable[[], Any], leaves: list[Tensor], above: Tensor) -> None:
    torch.autograd.grad(_first(forward()), leaves, above)


def _shortest(call: Callable[[], object], batches: int) -> float:
    """Seconds of a call in the shortest of so many batches, while nothing is collected."""
    timer = timeit.Timer(call, timer=time.thread_time)
    timer.timeit(20)
    count = max(int(BATCH_SECONDS / max(timer.timeit(1), 1e-7)), 1)
    return min(timer.repeat(batches, count)) / count


def in_turns(folders: list[Path], rounds: int, batches: int, only: Sequence[str] = ()) -> list[Times]:
    """``calls`` in processes that import r1kernels of each folder in turn; the shortest times of each folder."""
    best: list[Times] = [{} for _ in folders]
    for number in range(rounds):
        # whoever runs second does so as often as the other
        for place, folder in [*enumerate(folders)][:: 1 if number % 2 == 0 else -1]:
            environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
            # -P: not this file's folder, but PYTHONPATH
            command = [sys.executable, "-P", __file__, str(batches), *only]
            output = subprocess.run(
                command, env=environment, cwd=folder, check=True, capture_output=True, text=True
            ).stdout
            for op, times in json.loads(output).items():
                before = best[place].get(op, {})
                best[place][op] = {
                    phase: min(seconds, before.get(phase, seconds)) for phase, seconds in times.items()
                }
    return best


def measure(only: Sequence[str] = (), against: Path | None = None, rounds: int = 5) -> dict[str, Any]:
    """Seconds of this checkout, and of the other one."""
    folders = [ROOT] if against is None else [ROOT, against.resolve()]
    here, *others = in_turns(folders, rounds, 60, only)
    return {"rounds": rounds, "seconds": here} | ({"against": others[0]} if others else {})


def tables(record: dict[str, Any]) -> list[Any]:
    """A row per op; in brackets the difference to the other checkout."""
    from ..table import Table

    rows = []
    for op, seconds in record["seconds"].items():
        before = record.get("against", {}).get(op, {})
        texts = {phase: f"{1e6 * found:.2f}" for phase, found in seconds.items()}
        for phase in texts.keys() & before.keys():
            texts[phase] += f" ({1e6 * (seconds[phase] - before[phase]):+.2f})"
        rows.append([op, *(texts.get(phase, "-") for phase in PHASES)])
    return [Table("Microseconds per call", ("op", *PHASES), rows)]


if __name__ == "__main__":
    json.dump(calls(int(sys.argv[1]), sys.argv[2:]), sys.stdout)
