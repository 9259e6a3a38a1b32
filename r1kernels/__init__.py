"""r1kernels: kernels for training reasoning models, on CPUs and GPUs, exact and deterministic."""

from .backends import BackendError, explain, set_backend, set_strict, use_backend
from .checks import debug_checks
from .logprob import (
    GroupedLogprobs,
    grouped_logprobs,
    linear_grouped_logprobs,
    linear_logprobs,
    token_logprobs,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "GroupedLogprobs",
    "debug_checks",
    "explain",
    "grouped_logprobs",
    "linear_grouped_logprobs",
    "linear_logprobs",
    "set_backend",
    "set_strict",
    "token_logprobs",
    "use_backend",
]
