"""A guard against what would make the host wait for a GPU, that works without one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Raises where a tensor's value would reach the host, or a shape would depend on it: a sync on a GPU."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "repeat_interleave")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name.removeprefix("_") in self.READS or name in self.READS:
            raise AssertionError(f"{name} reads a value on the host")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise AssertionError("an index by a mask has a shape that depends on values")
        return function(*args, **(kwargs or {}))
