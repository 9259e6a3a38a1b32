"""Which configuration of a Triton kernel runs where: tables that are read, never an autotune in the middle of a run.

``default.json`` serves every GPU; ``<device>.json`` beside it, the device's name in lower case with underscores
(``nvidia_h200.json``), of the same form and with an entry of its own only where it differs, comes first. A table maps a
kernel, a class of GPUs and a kind of call to entries in rising order of ``tokens``: the first that is at least the tokens of
the call serves it, null serves any.

The entries of default.json follow from what the compiler says for each class (they fit, and next to nothing spills) and
from the bytes and operations of a tile; no GPU has measured them yet.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

_FOLDER = Path(__file__).parent
# the class of a capability: sm_86 has 99 KB of shared memory a block, sm_80 163 KB, sm_90 227 KB and tensor descriptors
_CLASSES = {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_90", (10, 3): "sm_90"}
_OTHERS = "sm_86"


class Tile(NamedTuple):
    """The configuration of a matrix kernel."""

    tokens: int
    columns: int
    depth: int
    group: int  # blocks of tokens that go through the vocabulary together
    warps: int
    stages: int
    descriptors: bool  # hidden and weight come by tensor descriptors, in persistent programs


def linear_forward(device: torch.device, kind: str, tokens: int | None) -> Tile:
    """The tile of the forward-only kernel of linear_logprobs.

    kind: "plain", "rich" (a cap, or statistics) or "float32". tokens: N; None: whatever N is, the same tile.
    """
    name, capability = "", (8, 0)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, capability = properties.name, (properties.major, properties.minor)
    return choose("linear_forward", name, capability, kind, tokens)


@functools.cache
def choose(kernel: str, device: str, capability: tuple[int, int], kind: str, tokens: int | None) -> Tile:
    """The entry for a device of this name and capability."""
    group = _CLASSES.get(capability, _OTHERS)
    file_name = "_".join(device.lower().replace("-", " ").split())
    for table in (file_name, "default"):
        entries = _table(table).get(kernel, {}).get(group, {}).get(kind, [])
        for entry in entries:
            limit = entry["tokens"]
            if limit is None or (tokens is not None and tokens <= limit):
                return Tile._make((*entry["tile"], *(entry[name] for name in Tile._fields[3:])))
    raise ValueError(f"kernel: expected an entry for {kernel}, {group}, {kind} in default.json, got none")


@functools.cache
def _table(name: str) -> dict[str, Any]:
    path = _FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if name and path.is_file() else {}
