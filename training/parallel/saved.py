"""Tensors of a resume point on the disk: a folder of safetensors, by torch.distributed.checkpoint.

Every rank writes the parts that it holds, of a tensor that all hold only one of them does. Any number of ranks reads them, in
any division.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from training.parallel import ranks

FILE_BYTES = 256 * 2**20  # a file is put together in memory, twice, before it is written


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes named tensors, divided ones too, into a folder that is there; every rank calls it."""
    if not tensors:
        return
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_file_numbers(tensors), save_distributed=True
    )
    try:
        with _alone_or_together() as alone:
            save(_separate(tensors), storage_writer=writer, no_dist=alone)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills named tensors, which may be divided; every rank calls it."""
    if tensors:
        with _alone_or_together() as alone:
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def described(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, without memory: their shapes and dtypes."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(each.size, dtype=each.properties.dtype, device="meta")
        for name, each in found.items()
        if isinstance(each, TensorStorageMetadata)
    }


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whole, on the CPU; every rank calls it."""
    tensors = {name: torch.empty_like(each, device="cpu") for name, each in described(folder).items()}
    read_into(folder, tensors)
    return tensors


@contextmanager
def _alone_or_together() -> Iterator[bool]:
    """Whether this process saves or loads alone; torch would warn that it does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield ranks.world() == 1


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> number, from 1, of the file that holds it: of at most FILE_BYTES, or of one tensor."""
    numbers = {}
    number, held = 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if held and held + size > FILE_BYTES:
            number, held = number + 1, 0
        numbers[name] = number
        held += size
    return numbers


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Detached contiguous CPU tensors of which no two share memory (safetensors refuses shared memory)."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        local = plain.to_local() if isinstance(plain, DTensor) else plain
        storage = local.untyped_storage()
        whole = storage.nbytes() == local.numel() * local.element_size()
        if not whole or (local.numel() and storage.data_ptr() in seen):
            plain = plain.clone()
            local = plain.to_local() if isinstance(plain, DTensor) else plain
        seen.add(local.untyped_storage().data_ptr())
        separate[name] = plain
    return separate
