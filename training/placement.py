"""Where models live and in which precision they compute: what the recipe's `device` and `dtype` mean.

Parameters and optimizer state are float32 everywhere. `dtype: bfloat16` runs forward passes under autocast, as mixed
precision does: matrix products in bfloat16, r1kernels' log-probs and losses in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from training.errors import UserError
from training.sections import Recipe

_device: ContextVar[torch.device | None] = ContextVar("device", default=None)


def device_of(recipe: Recipe) -> torch.device:
    """The device that a recipe asks for; "auto" is the GPU where torch sees one.

    Raises:
        UserError: the recipe asks for CUDA and torch sees no GPU.
    """
    available = torch.cuda.is_available()
    if recipe.device == "cuda" and not available:
        raise UserError("device: expected auto or cpu, since torch sees no CUDA device here, got cuda")
    return torch.device("cuda" if available and recipe.device != "cpu" else "cpu")


@contextmanager
def placed(recipe: Recipe) -> Iterator[None]:
    """Inside the block, models are put on the recipe's device and compute in its dtype."""
    device = device_of(recipe)
    token = _device.set(device)
    try:
        # without its cache: a weight's bfloat16 copy would outlive the optimizer step that changes the weight
        with torch.autocast(
            device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16", cache_enabled=False
        ):
            yield
    finally:
        _device.reset(token)


def current_device() -> torch.device:
    """Where a model belongs now; the CPU outside of a `placed` block."""
    return _device.get() or torch.device("cpu")
