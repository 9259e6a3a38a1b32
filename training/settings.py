"""Every setting in one table, from the metadata of the dataclasses in training.sections: docs/settings.md."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml

from training.config import field_types, is_section, range_of
from training.recipe import Recipe

HEAD = """# Every setting

Made by `python -m training settings`. A recipe is YAML of these keys; `key=value` words of a command lie over it. The second
default is that of a pretrained model (`model.pretrained`). A change of what is marked *any time* keeps finished work; of those, *last
bits* may change the last bits of what follows.
"""


def page() -> str:
    """The table as Markdown: first what all stages share, then a part for every section."""
    return "\n".join([HEAD, *_parts(Recipe, "")])


def _parts(kind: type, prefix: str) -> Iterator[str]:
    """The table of a section, and behind it a part for every one within it."""
    yield _table(kind, prefix)
    for name, inner in _inner(kind):
        yield f"## {prefix}{name}\n\n{_first_sentence(inner)}\n"
        yield from _parts(inner, f"{prefix}{name}.")


def _inner(kind: type) -> Iterator[tuple[str, type]]:
    """Fields that are sections, or tables or lists of them, as they are spelt in a key."""
    for name, annotation in field_types(kind).items():
        if is_section(annotation):
            yield name, annotation
        for argument in get_args(annotation):
            if is_section(argument):
                yield (f"{name}.NAME" if get_origin(annotation) is dict else f"{name}[]"), argument


def _first_sentence(kind: type) -> str:
    text = " ".join((kind.__doc__ or "").split())
    return text.split(". ")[0].rstrip(".") + "."


def _table(kind: type, prefix: str) -> str:
    rows = [
        "| key | default | of a pretrained model | allowed | what it is | change |",
        "|---|---|---|---|---|---|",
    ]
    types = field_types(kind)
    for field in dataclasses.fields(typing.cast(Any, kind)):
        if is_section(types[field.name]):
            continue
        told = field.metadata
        when = (
            "any time, last bits" if told.get("rounding") else "any time" if told.get("operational") else ""
        )
        other = _spelt(told["pretrained"]) if "pretrained" in told else ""
        cells = [
            f"`{prefix}{field.name}`",
            _spelt(_default(field)),
            other,
            _allowed(types[field.name], told),
            told["help"],
            when,
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(field: Any) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _spelt(value: Any) -> str:
    """A value as a recipe spells it."""
    if isinstance(value, dict):
        value = {key: "..." if dataclasses.is_dataclass(entry) else entry for key, entry in value.items()}
    if isinstance(value, float):
        return f"`{value:.6g}`"
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
        .removesuffix("\n...\n")
        .strip()
    )
    return f"`{text}`"


def _allowed(annotation: Any, told: Any) -> str:
    """The choices of a field, or its type with its range."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        kind = f"list of {_allowed(arguments[0], {})}"
    elif origin is dict:
        kind = f"{_allowed(arguments[0], {})} -> {_allowed(arguments[1], {})}"
    else:
        names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
        kind = names.get(annotation, "settings" if is_section(annotation) else "anything")
    return ", ".join(part for part in (kind, range_of(told)) if part)
