"""Benchmarks that others keep: EleutherAI's lm-eval on a checkpoint, `evaluate --benchmark lm-eval:gsm8k`.

A task is a name that lm-eval knows, or a YAML file of a task of one's own, whose data may lie on this machine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import optional
from training.config import unknown
from training.errors import UserError

LM_EVAL = "lm-eval"


class Options(NamedTuple):
    """How a benchmark is asked. limit: examples of a task, None: all; shots: worked examples, None: as many as the task says;
    chat: through the tokenizer's chat template; batch_size: sequences at a time."""

    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    batch_size: int = 64


def check(spec: str) -> None:
    """Raises a UserError where `spec` is no benchmark, or its package is not installed."""
    kind, _, task = spec.partition(":")
    if kind != LM_EVAL or not task:
        raise UserError(f"--benchmark: expected {LM_EVAL}:TASK, as in {LM_EVAL}:gsm8k, got {spec!r}")
    optional.check_installed("lm_eval", f"--benchmark {spec}")
    if _is_file(task) and not Path(task).is_file():
        raise UserError(f"--benchmark: there is no file {task}")


def run(
    spec: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options
) -> list[dict[str, Any]]:
    """The results of a benchmark, a row for each task of it.

    Returns:
        rows {"benchmark", "task", "metrics": name -> value, "samples"}; names as lm-eval has them, "acc,none".

    Raises:
        UserError: there is no such task, or its data cannot be read.
    """
    check(spec)
    task = spec.partition(":")[2]
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if _is_file(task):
        # a file names by path all that it includes
        manager = TaskManager(include_defaults=False)
        tasks = _loaded(manager, spec, task)
    else:
        manager, tasks = _known(), [task]
        if task not in manager.all_tasks:
            raise unknown("task of lm-eval", task, manager.all_tasks)
    served = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=served,
            tasks=tasks,
            task_manager=manager,
            limit=options.limit,
            num_fewshot=options.shots,
            apply_chat_template=options.chat,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (OSError, ConnectionError, ValueError) as error:  # data that is not there, mostly
        raise UserError(f"--benchmark {spec}: {str(error).strip().splitlines()[0]}") from None
    samples = found.get("n-samples", {})
    return [
        {
            "benchmark": spec,
            "task": each,
            "metrics": _numbers(results),
            "samples": samples.get(each, {}).get("effective"),
        }
        for each, results in found["results"].items()
    ]


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _loaded(manager: Any, spec: str, file: str) -> list[Any]:
    """The task in a file."""
    try:
        return list(manager.load([file])["tasks"].values())
    except Exception as error:  # of many types, by what the file holds
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"--benchmark {spec}: this is no task of lm-eval: {reason}") from None


@functools.cache  # thousands of files are read
def _known() -> Any:
    """The tasks that come with lm-eval."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in name
    }
