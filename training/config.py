"""Strict settings: nested dataclasses from mappings, where a wrong key or type is one clear line.

`build` turns a mapping into a dataclass and refuses unknown keys (the nearest known one is named), wrong types
and values below a field's minimum. `merge` and `override` work on mappings that spell a dataclass of the given
type, so that defaults, YAML files and `key=value` words are laid over each other before anything is built.
"""

import copy
import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from training.errors import UserError


def about(help: str, **metadata: Any) -> dict[str, Any]:
    """Metadata of a dataclass field: what it is for, and what `setting` knows; filled: a list or table has an entry."""
    told = {name: value for name, value in metadata.items() if value is not None and value is not False}
    return {"help": f"of no effect: {help}" if told.get("idle") else help, **told}


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    pretrained: Any = None,
    operational: bool = False,
    rounding: bool = False,
    idle: bool = False,
) -> Any:
    """A dataclass field.

    Args:
        help: what it is for, in one line of docs/settings.md.
        minimum, above, maximum, below: its range; an end is part of it (minimum, maximum) or not (above, below).
        pretrained: the default where the model is a pretrained one; None: the same.
        operational: it steers how a stage runs, never what it computes: a change keeps finished work.
        rounding: it steers how a stage computes: a change keeps finished work and may change the last bits of what follows.
        idle: the stage has it from those that it is made of, and does not read it; `help` says why.
    """
    ends = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    kind = {"operational": operational or rounding, "rounding": rounding, "idle": idle}
    return dataclasses.field(default=default, metadata=about(help, pretrained=pretrained, **ends, **kind))


def rounding_differences(before: Any, after: Any, where: str = "") -> list[str]:
    """The `rounding` fields in which two dataclasses of a type differ: "threads = 1 and now it is 2"."""
    found = []
    for field in dataclasses.fields(after):
        old, new, place = getattr(before, field.name), getattr(after, field.name), f"{where}{field.name}"
        if field.metadata.get("rounding") and old != new:
            found.append(f"{place} = {old} and now it is {new}")
        elif is_section(type(new)):
            found += rounding_differences(old, new, f"{place}.")
    return found


FEW = 20  # names that one line can hold
LIKE = 0.5  # likeness from which on a name may be what another one was meant to be


def nearest(name: str, known: Iterable[str], likeness: float = LIKE) -> str:
    """The entry of `known` that is spelt most like `name`; "" where none has that `likeness` (0: any, 1: equal)."""
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=likeness)
    return matches[0] if matches else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist; it names the one that is spelt like it, else all where they are few."""
    known = sorted(known)
    suggestion = nearest(name, known)
    told = f": did you mean {suggestion!r}?" if suggestion else ""
    if not suggestion and 0 < len(known) <= FEW:
        told = f": expected one of {', '.join(known)}"
    return UserError(f"unknown {kind} {name!r}{told}")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved type of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_section(kind: Any) -> bool:
    """Whether a field type is itself a dataclass."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def paths(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass, sections and leaves."""
    found = []
    for name, kind in field_types(cls).items():
        found.append(prefix + name)
        if is_section(kind):
            found += paths(kind, f"{prefix}{name}.")
    return found


def build(cls: type, values: Any, where: str = "", root: type | None = None, pretrained: bool = False) -> Any:
    """An instance of the dataclass `cls` from a mapping; missing keys take their defaults.

    Args:
        cls: dataclass type.
        values: mapping of field names to values, nested as the dataclass is.
        where: dotted key of this section, for messages.
        root: outermost dataclass, whose dotted keys are offered as the nearest; `cls` itself by default.
        pretrained: missing keys take their defaults for a pretrained model; a section with a key `pretrained` of its own says
            so for itself.

    Raises:
        UserError: a key that does not exist, a value of the wrong type, or one out of its range.
    """
    root = root or cls
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'the recipe'}: expected keys with values, got {values!r}")
    kinds = field_types(cls)
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in kinds:
            known = paths(root) if where in ("", *paths(root)) else [prefix + kind for kind in kinds]
            raise unknown("key", f"{prefix}{name}", known)
    built = {}
    if "pretrained" in kinds:
        pretrained = bool(values.get("pretrained"))
    for field in dataclasses.fields(cls):
        if field.name not in values and pretrained and "pretrained" in field.metadata:
            built[field.name] = field.metadata["pretrained"]
        elif field.name not in values and pretrained and is_section(kinds[field.name]):
            built[field.name] = build(kinds[field.name], {}, prefix + field.name, root, pretrained)
        elif field.name in values:
            place = prefix + field.name
            value = _value(kinds[field.name], values[field.name], place, root, pretrained)
            check_range(place, field.metadata, value)
            built[field.name] = value
    return cls(**built)


# End of a range in a field's metadata -> how it is said, and whether a value keeps to it.
_ENDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "minimum": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def range_of(metadata: Mapping[str, Any]) -> str:
    """The range of a field in words: "more than 0 and at most 1"; "" where it has none."""
    if metadata.get("filled"):
        return "at least one entry"
    return " and ".join(f"{word} {metadata[end]:g}" for end, (word, _) in _ENDS.items() if end in metadata)


def check_range(place: str, metadata: Mapping[str, Any], value: Any) -> None:
    """Raises a UserError where a value is not in the range of its field; None is in every range."""
    kept = all(
        keeps(value, metadata[end])
        for end, (_, keeps) in _ENDS.items()
        if end in metadata and value is not None
    )
    if not kept or (metadata.get("filled") and not value):
        shown = f"{value:g}" if isinstance(value, (int, float)) else value
        raise UserError(f"{place}: expected {range_of(metadata)}, got {shown}")


def _value(kind: Any, value: Any, where: str, root: type, pretrained: bool) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return copy.deepcopy(value)
    if is_section(kind):
        return build(kind, value, where, root, pretrained)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        return None if value is None else _value(options[0], value, where, root, pretrained)
    if origin is Literal:
        if value in get_args(kind):
            return value
        choices = ", ".join(str(choice) for choice in get_args(kind))
        raise UserError(f"{where}: expected one of {choices}, got {value!r}")
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {value!r}")
        (item,) = get_args(kind)
        return [
            _value(item, entry, f"{where}[{index}]", root, pretrained) for index, entry in enumerate(value)
        ]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected names with values, got {value!r}")
        key_kind, item = get_args(kind)
        return {
            _value(key_kind, key, f"{where} (name)", root, pretrained): _value(
                item, entry, f"{where}.{key}", root, pretrained
            )
            for key, entry in value.items()
        }
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float:
        # YAML 1.1 reads 5e-4 as text, so text that spells a number is a number here.
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif (kind is int and isinstance(value, int) and not isinstance(value, bool)) or (
        kind in (bool, str) and isinstance(value, kind)
    ):
        return value
    names = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}
    raise UserError(f"{where}: expected {names[kind]}, got {value!r}")


def merge(cls: type, below: dict[str, Any], above: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`above` laid over `below`: sections are merged key by key, everything else is replaced whole. Neither is changed."""
    merged = {**below}
    kinds = field_types(cls)
    for name, value in above.items():
        kind = kinds.get(name)
        if kind is not None and is_section(kind) and isinstance(value, Mapping):
            value = merge(kind, merged.get(name, {}), value, f"{where}{name}.")
        merged[name] = value
    return merged


def override(cls: type, values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`values` with one dotted `key` replaced, themselves unchanged; every key but the last of a plain table must exist.

    Raises:
        UserError: the key does not exist; the nearest one is named.
    """
    changed = {**values}
    parts = key.split(".")
    table: Any = changed
    kind: Any = cls
    for depth, part in enumerate(parts):
        if is_section(kind):
            kinds = field_types(kind)
            if part not in kinds:
                raise unknown(
                    "key", key, paths(cls) if depth < 2 else [".".join([*parts[:depth], n]) for n in kinds]
                )
            kind = kinds[part]
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
            if is_section(kind) and part not in table:
                raise unknown("key", key, [".".join([*parts[:depth], name]) for name in table])
        else:
            raise UserError(f"unknown key {key!r}: {'.'.join(parts[:depth])} holds a single value")
        if depth == len(parts) - 1:
            table[part] = value
        else:
            table[part] = table = copy.copy(table.get(part, {}))
    return changed
