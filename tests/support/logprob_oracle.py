"""Log-prob and entropy of one row by the textbook formulas in 60 decimal digits, where nothing cancels."""

from __future__ import annotations

import functools

import mpmath
import torch
from torch import Tensor


def row(logits: list[float], target: int, temperature: float = 1.0) -> tuple[float, float]:
    """(log-prob, entropy) of one row of logits."""
    with mpmath.workdps(60):
        _, logs, entropy = softmax(tuple(logits), temperature)
        return float(logs[target]), float(entropy)


def gradient(
    logits: list[float], target: int, grad_logp: float, grad_entropy: float, temperature: float = 1.0
) -> list[float]:
    """d (grad_logp logp + grad_entropy H) / d logits of one row, from the derivatives of the textbook formulas."""
    return list(_gradient(tuple(logits), target, grad_logp, grad_entropy, temperature))


@functools.lru_cache(maxsize=64)  # every backend asks for the same rows
def _gradient(
    logits: tuple[float, ...], target: int, grad_logp: float, grad_entropy: float, temperature: float
) -> list[float]:
    with mpmath.workdps(60):
        probs, logs, entropy = softmax(logits, temperature)
        of_logp, of_entropy = (mpmath.mpf(value) / temperature for value in (grad_logp, grad_entropy))
        # d logp / d z_v = 1[v = y] - p_v, d H / d z_v = -p_v (log p_v + H)
        result = [
            -p * (of_logp + of_entropy * (log + entropy)) if p > 0 else p
            for p, log in zip(probs, logs, strict=True)
        ]
        result[target] += of_logp
        return [float(value) for value in result]


@functools.lru_cache(maxsize=128)  # every backend, the values and the gradients ask for the same rows
def softmax(
    logits: tuple[float, ...], temperature: float
) -> tuple[list[mpmath.mpf], list[mpmath.mpf], mpmath.mpf]:
    """The distribution of a row, its logarithms and its entropy."""
    x = [mpmath.mpf(value) / mpmath.mpf(temperature) for value in logits]
    largest = max(x)
    weights = [mpmath.exp(value - largest) for value in x]
    total = mpmath.fsum(weights)
    probs = [weight / total for weight in weights]
    log_sum = largest + mpmath.log(total)
    logs = [value - log_sum for value in x]
    entropy = -mpmath.fsum(p * log for p, log in zip(probs, logs, strict=True) if p > 0)
    return probs, logs, entropy


def rows(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) in float64 of logits (N, V) and targets (N,)."""
    pairs = [row(z, int(y), temperature) for z, y in zip(logits.double().tolist(), targets, strict=True)]
    values = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def gradients(
    logits: Tensor, targets: Tensor, grad_logp: Tensor, grad_entropy: Tensor, temperature: float = 1.0
) -> Tensor:
    """The gradient in float64 of logits (N, V) for upstream gradients (N,)."""
    arguments = zip(
        logits.double().tolist(), targets.tolist(), grad_logp.tolist(), grad_entropy.tolist(), strict=True
    )
    return torch.tensor(
        [gradient(*row_arguments, temperature) for row_arguments in arguments], dtype=torch.float64
    )
