"""Where models live and how they compute: what the recipe's `device`, `dtype`, `experts_implementation` and
`gradient_checkpointing` mean.

Parameters and optimizer state are float32 everywhere, whatever dtype a folder has; a checkpoint is written in the dtype
of the folder that the model came from. `dtype: bfloat16` runs forward passes under autocast, as mixed precision does:
matrix products in bfloat16, r1kernels' log-probs and losses in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from training.errors import UserError
from training.sections import Recipe

_device: ContextVar[torch.device | None] = ContextVar("device", default=None)
_experts: ContextVar[str] = ContextVar("experts", default="r1kernels")
_recomputes: ContextVar[bool] = ContextVar("recomputes", default=False)


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
    """Inside the block, models are put on the recipe's device and compute in its dtype, with its experts."""
    device = device_of(recipe)
    device_before, experts_before = _device.set(device), _experts.set(recipe.experts_implementation)
    recomputes_before = _recomputes.set(recipe.gradient_checkpointing)
    try:
        # without its cache: a weight's bfloat16 copy would outlive the optimizer step that changes the weight
        with torch.autocast(
            device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16", cache_enabled=False
        ):
            yield
    finally:
        _device.reset(device_before)
        _experts.reset(experts_before)
        _recomputes.reset(recomputes_before)


def current_device() -> torch.device:
    """Where a model belongs now; the CPU outside of a `placed` block."""
    return _device.get() or torch.device("cpu")


def current_experts() -> str:
    """The experts implementation of a model that is prepared now; r1kernels outside of a `placed` block."""
    return _experts.get()


def recomputes() -> bool:
    """Whether a model that is prepared now recomputes activations in the backward pass (`gradient_checkpointing`)."""
    return _recomputes.get()
