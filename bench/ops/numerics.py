"""When a result counts: exact results in float64, the error against them, and the most that a row may show."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# unit roundoff, and the most that any error may be, both relative to the largest exact value
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
CAP = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
CHECKED_COLUMNS = 512  # of the gradient of a head
_ROWS_AT_ONCE = 128


class Exact(NamedTuple):
    """Values in float64, of all of a result or of some places along its first dimensions."""

    values: Tensor
    places: Tensor | None = None


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


def error(found: Tensor, exact: Exact) -> float:
    """The largest difference over the largest exact value; infinite where NaN or infinities stand in other places."""
    part = found.detach()
    if exact.places is not None:
        part = part.reshape(-1, *exact.values.shape[1:])[exact.places]
    part = part.to(exact.values.device, torch.float64).reshape(exact.values.shape)
    finite = torch.isfinite(exact.values)
    if not torch.equal(torch.isfinite(part), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = exact.values[finite].abs().max().clamp(min=1e-30)
    return float((part - exact.values)[finite].abs().max() / scale)


def allowed(eager_error: float | None, dtype: torch.dtype) -> float:
    """Twice the error of eager PyTorch in the same dtype plus a few roundings, and at most the cap of the dtype."""
    slack = 4 * ROUNDOFF[dtype]
    return CAP[dtype] if eager_error is None else min(2 * eager_error + slack, CAP[dtype])


def spread(size: int, count: int, device: torch.device) -> Tensor:
    """Up to ``count`` places out of ``size``, evenly spread, first and last included."""
    return torch.linspace(0, size - 1, min(size, count), dtype=torch.float64, device=device).round().long()


# from float64 logits of some rows, and which rows these are: values, and their slopes in the logits
Rows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def of_logits(logits: Tensor, name: str, rows: Rows, above: Tensor) -> dict[str, Exact]:
    """A value of every row, and d logits, given the gradient of every value."""
    blocks = (slice(start, start + _ROWS_AT_ONCE) for start in range(0, logits.shape[0], _ROWS_AT_ONCE))
    values, slopes = zip(*(rows(logits[block].double(), block) for block in blocks), strict=True)
    gradient = torch.cat(slopes) * above.double().unsqueeze(1)
    return {name: Exact(torch.cat(values)), "d logits": Exact(gradient)}


def of_head(hidden: Tensor, weight: Tensor, name: str, rows: Rows, above: Tensor) -> dict[str, Exact]:
    """A value and dX of every token, dW of up to CHECKED_COLUMNS rows of the head, given the gradient of every value."""
    weight = weight.double()
    columns = spread(len(weight), CHECKED_COLUMNS, weight.device)
    d_weight = weight.new_zeros(len(columns), weight.shape[1])
    values, d_hidden = [], []
    for start in range(0, hidden.shape[0], _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        x = hidden[block].double()
        value, slopes = rows(x @ weight.T, block)
        slopes *= above[block].double().unsqueeze(1)
        values.append(value)
        d_hidden.append(slopes @ weight)
        d_weight += slopes[:, columns].T @ x
    found = {name: torch.cat(values), "d hidden": torch.cat(d_hidden)}
    return {name: Exact(value) for name, value in found.items()} | {"d weight": Exact(d_weight, columns)}


def softmax_rows(
    logits: Tensor, targets: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None = None
) -> dict[str, Tensor]:
    """In float64 from differences to the target: with S = sum over the others of e^(z - z_y), log p_y = -log1p(S)."""
    z, column = logits.double(), targets.unsqueeze(1)
    shifted = z - z.gather(1, column)
    others = shifted.exp().scatter(1, column, 0.0).sum(1)
    logp = -others.log1p()
    log_probs = shifted + logp.unsqueeze(1)
    probs = log_probs.exp()
    # d log p_y / d z_v = 1[v = y] - p_v, and 1 - p_y = S / (1 + S)
    above = grad_logp.double()
    gradient = (-above.unsqueeze(1) * probs).scatter(1, column, (above * others / (1 + others)).unsqueeze(1))
    entropy = -(probs * log_probs).sum(1)
    if grad_entropy is not None:
        gradient -= grad_entropy.double().unsqueeze(1) * probs * (log_probs + entropy.unsqueeze(1))
    return {"logp": logp, "entropy": entropy, "d logits": gradient}
