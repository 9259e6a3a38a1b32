"""A recipe is read here: the defaults of training.sections, YAML files over them, `key=value` words over both.

`load("tiny", ["zero.steps=10"])` reads recipes/tiny.yaml (or a path), lays it over the defaults, lays the
overrides over that and builds a `Recipe`. A YAML file may start with `extends: NAME` and then holds only what
differs. An unknown key is an error that names the nearest one.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from training import sources
from training.config import build, merge, override, unknown
from training.errors import UserError
from training.sections import (
    STAGE_NAMES,
    Base,
    ColdStart,
    Distill,
    Evaluate,
    Example,
    Grpo,
    Judge,
    Lora,
    Model,
    NextToken,
    Parallel,
    Recipe,
    Rejection,
    RewardModels,
    RlAll,
    RlReasoning,
    Rollout,
    Sampling,
    Sft1,
    Sft2,
    Student,
    Zero,
)

__all__ = [
    "STAGE_NAMES",
    "Base",
    "ColdStart",
    "Distill",
    "Evaluate",
    "Example",
    "Grpo",
    "Judge",
    "Lora",
    "Model",
    "NextToken",
    "Parallel",
    "Recipe",
    "Rejection",
    "RewardModels",
    "RlAll",
    "RlReasoning",
    "Rollout",
    "Sampling",
    "Sft1",
    "Sft2",
    "Student",
    "Zero",
    "load",
    "make",
    "names",
    "stage_config",
    "start_of",
    "to_dict",
]

HIGH_RATE = 1e-4  # a learning rate above this one is for a small model
WITHOUT_PROBLEMS = ("base", "sft1", "sft2")  # stages that read no problems of the tasks

RECIPES = Path(__file__).parent / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice in a mapping, as its standard has it; PyYAML alone takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            keys.add((key.tag, str(key.value)))
        return node


SHARED = ("seed", "dtype", "task", "task_options", "system_prompt", "response_format", "model")


def stage_config(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What decides the result of a stage: its own section and the shared settings, without operational fields, and the
    hashes of the files that a person brought.

    Raises:
        UserError: such a file cannot be read.
    """
    shared = {name: _plain(getattr(recipe, name)) for name in SHARED}
    if stage not in WITHOUT_PROBLEMS:
        shared["rollout"] = _plain(recipe.rollout, keep_operational=False)
    config = {**shared, stage: _plain(getattr(recipe, stage), keep_operational=False)}
    brought = sources.hashes(_brought(recipe, stage))
    if brought:
        config["files"] = brought
    read_back: dict[str, Any] = json.loads(json.dumps(config))  # as it comes back from a file: keys are text
    return read_back


def _brought(recipe: Recipe, stage: str) -> dict[str, Path]:
    """The files and folders of a person that a stage reads, by the name under which the recipe has them."""
    section = getattr(recipe, stage)
    specs = [] if stage in WITHOUT_PROBLEMS else list(recipe.task)
    specs += getattr(section, "rewards", {})
    found = {spec: path for spec in specs if (path := sources.path_of(spec)) is not None}
    start = start_of(recipe, stage)
    others = [getattr(section, "data", ""), "" if start in STAGE_NAMES else start]
    pretrained = [student.pretrained for student in getattr(section, "students", {}).values()]
    pretrained += [recipe.model.pretrained] if stage == "base" else []
    # the others are names of what does not change
    others += [each for each in pretrained if Path(each).is_dir()]
    return found | {each: Path(each) for each in others if each}


def start_of(recipe: Recipe, stage: str) -> str:
    """What a stage goes on from, or its teacher: the name of a stage or the folder of a checkpoint; "" for neither.

    Pretrained students that learn the text of a file of traces need no teacher.
    """
    section = getattr(recipe, stage)
    if stage == "distill" and section.data:
        names = section.students
        if all(section.beginning_of(name).pretrained and section.method_of(name) == "sft" for name in names):
            return ""
    start: str = getattr(section, "start", getattr(section, "teacher", ""))
    return start


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested dictionaries, in the order of the fields; `load` reads it back unchanged."""
    return _plain(recipe)


def _plain(value: Any, keep_operational: bool = True) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            item.name: _plain(getattr(value, item.name), keep_operational)
            for item in dataclasses.fields(value)
            if keep_operational or not item.metadata.get("operational")
        }
    if isinstance(value, dict):
        return {key: _plain(entry, keep_operational) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry, keep_operational) for entry in value]
    return value


def names() -> list[str]:
    """The recipes that come with the trainer."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe `name_or_path` with `key=value` overrides.

    Args:
        name_or_path: a name of `names()`, or the path of a YAML file (it ends in .yaml or .yml).
        overrides: words of the form "zero.steps=10"; the value is read as YAML.

    Raises:
        UserError: unknown recipe, key or stage (the nearest is named), wrong type, broken YAML, or a stage whose
            parent the recipe leaves out.
    """
    return _resolved(lambda pretrained: _read(_find(name_or_path), (), pretrained), overrides)


def make(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of no file: `values` over the defaults, and `key=value` overrides over both; errors as in `load`."""
    build(Recipe, values)  # unknown keys are reported before they are merged
    return _resolved(lambda pretrained: merge(Recipe, _defaults(pretrained), values), overrides)


def _resolved(read: Callable[[bool], dict[str, Any]], overrides: Sequence[str]) -> Recipe:
    """The recipe of the values that `read` gives, over the defaults for a pretrained model or for one from nothing."""
    values = _overridden(read(False), overrides)
    if (values.get("model") or {}).get("pretrained"):
        values = _overridden(read(True), overrides)
    recipe: Recipe = build(Recipe, values)
    for stage in recipe.stages:
        if stage not in STAGE_NAMES:
            raise unknown("stage", stage, STAGE_NAMES)
    return recipe


def remarks(recipe: Recipe) -> list[str]:
    """What a recipe says that its model will hardly bear: warnings for whoever starts it."""
    if not recipe.model.pretrained:
        return []
    return [
        f"{stage}.lr = {config.lr:g} is a rate for models of a million parameters, and {recipe.model.pretrained} was pretrained"
        for stage in recipe.stages
        if isinstance(config := getattr(recipe, stage), NextToken | Grpo)
        and stage != "base"
        and config.lr > HIGH_RATE * (10 if recipe.model.lora.rank else 1)
    ]


@functools.cache
def _defaults(pretrained: bool) -> dict[str, Any]:
    return to_dict(build(Recipe, {}, pretrained=pretrained))


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping of a recipe with `key=value` words laid over it."""
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r}: expected key=value, as in zero.steps=10")
        try:
            value = _parsed(text)
        except yaml.YAMLError as error:
            raise UserError(f"{word!r}: the value is not YAML: {getattr(error, 'problem', error)}") from None
        values = override(Recipe, values, key, value)
    return values


@functools.lru_cache(256)  # every command of a run reads its recipe several times
def _parsed(text: str) -> Any:
    return yaml.load(text, _Loader)


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}")
        return path
    if str(name_or_path) not in names():
        raise unknown("recipe", str(name_or_path), names())
    return RECIPES / f"{name_or_path}.yaml"


def _read(path: Path, seen: tuple[Path, ...], pretrained: bool) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path}: extends itself")
    try:
        written = _parsed(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        problem = getattr(error, "problem", None)  # in the words of PyYAML
        raise UserError(
            f"{path}"
            + (f", line {line + 1}" if line is not None else "")
            + ": not valid YAML"
            + (f": {problem}" if problem else "")
        ) from None
    written = {} if written is None else written
    if not isinstance(written, dict):
        raise UserError(f"{path}: expected keys with values")
    written = {"name": path.stem, **written}
    parent = written.pop("extends", None)
    below = _defaults(pretrained) if parent is None else _read(_find(str(parent)), (*seen, path), pretrained)
    try:
        build(Recipe, written)  # unknown keys are reported before they are merged
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return merge(Recipe, below, written)
