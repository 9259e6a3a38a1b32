"""token_logprobs: log-prob and entropy of chosen tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-prob of each target and, on request, the entropy of its distribution, in one pass over the logits.

    .. math:: logp = \log softmax(z / temperature)_y, \qquad H = -\sum_v p_v \log p_v

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides.
        targets: (...), int64, in [0, V) or ``ignore_index``.
        temperature: a number above 0, or a tensor: () or the shape of ``targets`` (one per token); it gets no gradient.
        return_entropy: also return the entropy, in nats.
        ignore_index: tokens with this target give log-prob 0, entropy 0 and a zero gradient row.
        inplace_backward: write the gradient over the logits, which must not be a leaf or a view of one, expanded or
            overlapping. A later reader of the logits, a second backward among them, gets autograd's error.
        backend: "cuda", "triton", "cpu" or "reference": that one or an error; None chooses (see r1kernels.backends).

    Returns:
        logp (...), or (logp, entropy): float32, float64 for float64 logits. Gradients come in the dtype of the logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a temperature that is not above 0.
        IndexError: a target out of range (on the CPU; on CUDA the row becomes NaN unless ``debug_checks(True)``).

    Precision: float32 accumulation in a form without cancellation (specs: ``reference.py``): logp <= 0, entropy >= 0, and
    neither they nor the gradient lose digits where one logit leads. -inf logits have probability 0; a target at -inf has
    logp -inf; a row that is all -inf, or holds NaN or +inf, gives NaN for that row alone. Deterministic, and bitwise independent of
    the other rows and the number of threads. float64 is served by the reference alone.
    """
    checks.tensor("logits", logits, dtypes=checks.FLOATS)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    checks.tensor("targets", targets, dtypes=(torch.int64,), shape=logits.shape[:-1], like=logits)
    checks.boolean("return_entropy", return_entropy)
    ignore_index = checks.integer("ignore_index", ignore_index)
    if checks.boolean("inplace_backward", inplace_backward):
        refusal = why_not_overwritable(logits)
        if refusal:
            raise ValueError(f"inplace_backward: expected logits {refusal}")
    temperatures, scalar = split_temperature(temperature, targets, ignore_index, logits.dtype)
    if checks.values_visible(targets):
        checks.in_range("targets", targets, 0, logits.shape[-1], allow=ignore_index)
    logp, entropy = backends.dispatch(
        "token_logprobs",
        backend,
        in_rows(logits),
        targets.reshape(-1).contiguous(),
        temperatures,
        scalar,
        ignore_index,
        return_entropy,
        inplace_backward,
    )
    logp = logp.view(targets.shape)
    return (logp, entropy.view(targets.shape)) if return_entropy else logp


def split_temperature(
    temperature: float | Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """A temperature as (one per token (N,) or None, the number that holds for all), checked; dtype: that of the inputs."""
    checked = check_temperature(temperature, targets, targets != ignore_index, dtype)
    return (checked.reshape(-1).contiguous(), 1.0) if isinstance(checked, Tensor) else (None, checked)


def check_temperature(
    temperature: float | Tensor, targets: Tensor, counted: Tensor, dtype: torch.dtype
) -> float | Tensor:
    """A number that holds for all tokens, or one per token in the shape of ``targets``, in float32 (float64 for that dtype).

    What stands where ``counted`` (...) is False is not looked at.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        number = float(checks.positive("temperature", temperature))
        if not torch.compiler.is_compiling() or number == 1.0:
            return number
        # an op takes a number for a constant of the graph, which another temperature would compile once more
        return torch.ones(targets.shape, dtype=wide, device=targets.device) * number
    if temperature.ndim == 0:
        checks.tensor("temperature", temperature, dtypes=checks.FLOATS)
        temperature = temperature.to(targets.device).expand(targets.shape)
    checks.tensor("temperature", temperature, dtypes=checks.FLOATS, shape=targets.shape, like=targets)
    if temperature.requires_grad:
        raise ValueError("temperature: expected a tensor without gradient, got one that requires it")
    if checks.values_visible(temperature, counted):
        checks.all_positive("temperature", torch.where(counted, temperature, 1.0))
    return temperature.to(wide)


def in_rows(logits: Tensor) -> Tensor:
    """logits (..., V) as (B, T, V), without a copy where the strides allow it (slices like ``logits[:, :-1]`` do)."""
    if logits.ndim == 3:
        return logits
    if logits.ndim < 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits.flatten(0, -3)


def why_not_overwritable(logits: Tensor) -> str:
    """Why a gradient must not be written over the logits, as the end of an error; empty if it may."""
    if logits.requires_grad and logits.is_leaf:
        return "that are not a leaf, got a leaf that requires a gradient"
    if logits.requires_grad and logits._base is not None and logits._base.is_leaf:
        return "that are not a leaf, got a view of one that requires a gradient"
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return f"without overlap, got strides {logits.stride()} for shape {tuple(logits.shape)}"
            extent = stride * size
    return ""
