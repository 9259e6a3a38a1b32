"""Sources of problems, each by its name in a recipe."""

from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from training import language
from training.config import unknown
from training.errors import UserError
from training.tasks.problem import Task

# Name -> module and class; a class that takes an argument gets what follows the colon of the specification.
_TASKS = {
    "arithmetic": ("training.tasks.arithmetic", "ArithmeticTask", ""),
    "general": ("training.tasks.general", "GeneralTask", ""),
    "countdown": ("training.tasks.countdown", "CountdownTask", ""),
    "reasoning_gym": ("training.tasks.reasoning_gym", "ReasoningGymTask", "name"),
    "jsonl": ("training.tasks.jsonl", "JsonlTask", "path"),
    "parquet": ("training.tasks.parquet", "ParquetTask", "path"),
    "hf": ("training.tasks.hub", "HubTask", "dataset"),
    "gsm_symbolic": ("training.tasks.gsm_symbolic", "GsmSymbolicTask", "languages"),
    "python": ("training.tasks.own", "OwnTask", "spec"),
}


def names() -> list[str]:
    """The tasks by the name that stands before the colon of a specification."""
    return list(_TASKS)


def get_task(spec: str, **options: Any) -> Task:
    """Make the task that a recipe names, and tell `training.language` the words of its module (`WORDS`).

    Args:
        spec: "arithmetic", "general", "countdown", "reasoning_gym:<data set>", "gsm_symbolic:<languages>", "jsonl:<path>",
            "parquet:<path>", "hf:<data set>" or "python:<file>:<class>".
        options: keyword arguments of the task's class.

    Raises:
        UserError: unknown task or option (naming the nearest one), a missing or superfluous argument.
    """
    name, colon, argument = spec.partition(":")
    if name not in _TASKS:
        raise unknown("task", name, _TASKS)
    module_name, class_name, expected = _TASKS[name]
    if expected and not argument:
        raise UserError(f"task: {name!r} needs its {expected}, as in {name}:<{expected}>; got {spec!r}")
    if colon and not expected:
        raise UserError(f"task: {name!r} takes nothing after its name; got {spec!r}")
    module = import_module(module_name)
    maker = getattr(module, class_name)
    parameters = signature(maker).parameters
    known = [parameter for parameter in parameters if parameter != expected]
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in known:
                raise unknown(f"option of task {name!r}", option, known)
    for name_of_language, words in getattr(module, "WORDS", {}).items():
        if name_of_language != "neutral":
            language.register_words(name_of_language, words)
    task: Task = maker(argument, **options) if expected else maker(**options)
    return task
