"""Which configuration of a Triton kernel runs where: tables that are read, never an autotune in the middle of a run.

A family keeps its tables in a folder ``tuning``. ``default.json`` serves every GPU; ``<device>.json`` beside it, the device's
name in lower case with underscores (``nvidia_h200.json``), of the same form and with an entry of its own only where it
differs, comes first. A table maps a kernel, a class of GPUs and a kind of call to entries in rising order of a size of the
call: the first that is at least that size serves the call, null serves any.

The entries of the default.json follow from what the compiler says for each class (they fit, and next to nothing spills) and
from the bytes and operations of a tile; no GPU has measured them yet.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import torch

# the classes of a capability, the nearest first: sm_86 has 99 KB of shared memory a block, sm_80 163 KB, sm_90 227 KB and
# tensor descriptors, sm_100 the same, and its accumulators lie in a memory of their own, so that a tile's epilogue needs
# registers for all of it at once
_CLASSES = {
    (8, 0): ("sm_80",),
    (8, 7): ("sm_80",),
    (9, 0): ("sm_90",),
    (10, 0): ("sm_100", "sm_90"),
    (10, 3): ("sm_100", "sm_90"),
}
_OTHERS = ("sm_86",)


def name_and_capability(device: torch.device) -> tuple[str, tuple[int, int]]:
    """Of a GPU; on the CPU, in Triton's interpreter, those of the oldest class."""
    if device.type != "cuda":
        return "", (8, 0)
    properties = torch.cuda.get_device_properties(device)
    return properties.name, (properties.major, properties.minor)


@functools.cache
def entry(
    folder: Path,
    kernel: str,
    device: str,
    capability: tuple[int, int],
    kind: str,
    size: str,
    value: int | None,
) -> dict[str, Any]:
    """The entry for a device of this name and capability, and for ``value`` of the size that the entries call ``size``."""
    classes = _CLASSES.get(capability, _OTHERS)
    file_name = "_".join(device.lower().replace("-", " ").split())
    for table, group in itertools.product((file_name, "default"), classes):
        for found in _table(folder, table).get(kernel, {}).get(group, {}).get(kind, []):
            limit = found[size]
            if limit is None or (value is not None and value <= limit):
                return found
    raise ValueError(
        f"kernel: expected an entry for {kernel}, {classes[-1]}, {kind} in default.json, got none"
    )


@functools.cache
def _table(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if name and path.is_file() else {}
