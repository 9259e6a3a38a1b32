"""Keyed randomness: every random draw names what it is for, so there is no generator state to save.

A generator is made from (run seed, stage name, purpose, step or ids) at the place that needs it. A resumed run
therefore draws the same numbers as one that was never stopped, and a sample depends on its own ids alone,
whatever else shares its batch.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key(*parts: int | str) -> int:
    """The 63-bit key of `parts`: the leading 63 bits of the SHA-256 of their unambiguous spelling.

    Args:
        parts: integers and strings; ("a", 1) and ("a", "1") are different keys, and so are ("ab",) and ("a", "b").

    Returns:
        An integer in [0, 2**63), the same on every machine and in every process.

    Raises:
        TypeError: a part is neither an int nor a str (a float or a bool would hide a mistake).
    """
    digest = hashlib.sha256()
    for position, part in enumerate(parts):
        if isinstance(part, bool) or not isinstance(part, (int, str, np.integer)):
            raise TypeError(f"part {position} of a key must be an int or a str, got {type(part).__name__}")
        spelled = part if isinstance(part, str) else str(int(part))
        letter = "s" if isinstance(part, str) else "i"
        encoded = spelled.encode("utf-8")
        digest.update(f"{letter}{len(encoded)}:".encode())
        digest.update(encoded)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def numpy_rng(*parts: int | str) -> np.random.Generator:
    """A NumPy generator (PCG64) keyed by `parts`; see `key`."""
    return np.random.Generator(np.random.PCG64(key(*parts)))


@contextmanager
def torch_seed(*parts: int | str) -> Iterator[None]:
    """Inside the block, torch's global generators are keyed by `parts`, for what draws from nothing else: dropout."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key(*parts))
        yield
