"""sample_tokens: a token of each row of logits, by the inverse of the cumulated probabilities, and its log-prob.

B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..op import Contiguous, Kernel, Op

BLOCK = 256  # entries of the vocabulary that are summed before anything is cumulated


def sample_tokens(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""The token of each row at which the cumulated probability passes a number, and its log-prob.

    With p = softmax(logits / temperature), the token is the first y with p_0 + ... + p_y > uniform: numbers that are uniform in
    [0, 1) draw tokens with these probabilities, and the same numbers the same tokens, wherever and beside whatever they are drawn.

    Args:
        logits: (B, V), V at least 1, float32, bfloat16, float16 or float64; any strides. -inf is never drawn.
        uniform: (B,) float64 in [0, 1).
        temperature: a number above 0.
        backend: "cpu" or "reference": that one or an error; None chooses (see r1kernels.backends).

    Returns:
        (tokens (B,) int64, log-probs (B,) float64), without gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a temperature that is not above 0; on the
            CPU in eager mode, a number outside of [0, 1).

    Precision: probabilities are float32, their sums float64 (all float64 for float64 logits). A token of probability 0 is not drawn,
    whatever is rounded. A row that is all -inf, or holds NaN or +inf, gives some token in [0, V) and a log-prob of NaN. The bits of a row
    depend on itself alone, not on the number of threads. Deterministic; no host sync on CUDA.
    """
    checks.tensor("logits", logits, dtypes=checks.FLOATS, ndim=2)
    rows, vocabulary = logits.shape
    if vocabulary == 0:
        raise ValueError("logits: expected shape (B, V), V at least 1, got V = 0")
    checks.tensor("uniform", uniform, dtypes=(torch.float64,), shape=(rows,), like=logits)
    call = SampleCall(logits, uniform, checks.positive("temperature", temperature))
    try:
        tokens, logp = SAMPLE_TOKENS(backend, call)
    except RuntimeError:
        _check_values(call)  # the kernel has looked; in Python it costs as much as a small step
        raise
    return tokens, logp


class SampleCall(NamedTuple):
    """A checked call of sample_tokens; the argument list of its torch op."""

    logits: Contiguous
    uniform: Contiguous
    temperature: float


def _shapes(call: SampleCall) -> tuple[Tensor, Tensor]:
    rows = call.logits.shape[:1]
    return call.logits.new_empty(rows, dtype=torch.int64), call.logits.new_empty(rows, dtype=torch.float64)


def _check_values(call: SampleCall) -> None:
    if checks.values_visible(call.uniform):
        checks.all_in_unit("uniform", call.uniform)


@torch.no_grad()
def _reference(call: SampleCall) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    _check_values(call)
    scaled = call.logits.to(torch.promote_types(call.logits.dtype, torch.float32))
    # in this order no temperature is so small that the largest becomes infinite
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / call.temperature
    weights = scaled.exp()
    # Sums of blocks first: cumulating a large vocabulary in float64 costs more than all the rest.
    missing = -weights.shape[-1] % BLOCK
    blocks = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    blocks = blocks.unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    ends = sums.cumsum(dim=-1)
    target = call.uniform.unsqueeze(-1) * ends[:, -1:]
    block = (ends > target).int().argmax(dim=-1, keepdim=True)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    behind = target - (ends - sums).gather(1, block)
    # Where rounding lets the block end before the number, its last token that has a probability.
    passed = (inside > behind) | (inside == inside[:, -1:])
    tokens = block * BLOCK + passed.int().argmax(dim=-1, keepdim=True)
    logp = scaled.gather(1, tokens).double() - ends[:, -1:].log()
    return tokens.squeeze(1), logp.squeeze(1)


SAMPLE_TOKENS = Op(
    "sample_tokens",
    _reference,
    Kernel("sample_tokens", SampleCall, _shapes, backends=("cpu",)),
    decides="logits",
    only=("cpu",),
)
