"""The kernels of linear_grpo_loss: one pass over the logits, forward and backward of the head together.

N tokens, H hidden, V vocabulary. The pass is the tile loop of the log-prob ops; this file alone of the family knows what is
inside of those.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..logprob import cpu, cuda, tiles, triton_linear
from . import loss
from .linear import FORWARD, IGNORED, OnePassCall, Results
from .loss import KernelCall, Tokens
from .objective import Numbers

CHUNK_BYTES = 1 << 30  # of logits, float32, on a CPU
FEWEST = 256  # tokens per chunk: with fewer the head is read too often


def one_pass_of_counted(engine: tiles.Engine, call: OnePassCall) -> Results:
    """``one_pass``; the tokens that do not count cost nothing."""
    rows, counted = call.rows, call.loss.tokens.mask.squeeze(0).nonzero().squeeze(1)
    if counted.shape[0] == call.hidden.shape[0]:
        return one_pass(engine, call)
    results = one_pass(
        engine,
        call._replace(
            hidden=call.hidden[counted],
            rows=rows._replace(
                targets=rows.targets[counted],
                temperatures=None if rows.temperatures is None else rows.temperatures[counted],
            ),
            loss=call.loss._replace(tokens=_some(call.loss.tokens, counted)),
        ),
    )
    if not call.need_hidden:
        return results
    grad_hidden = results.grad_hidden.new_zeros(call.hidden.shape)
    return results._replace(grad_hidden=grad_hidden.index_copy_(0, counted, results.grad_hidden))


def one_pass_of_all(engine: tiles.Engine, call: OnePassCall) -> Results:
    """``one_pass`` on a GPU: which tokens count is not known on the host."""
    mask = call.loss.tokens.mask.squeeze(0)
    hidden = call.hidden.masked_fill(~mask.unsqueeze(1), 0)
    rows = call.rows._replace(targets=call.rows.targets.where(mask, IGNORED))
    return one_pass(engine, call._replace(hidden=hidden, rows=rows))


def one_pass(engine: tiles.Engine, call: OnePassCall) -> Results:
    """Forward and backward of the head together, a few tokens at a time."""
    hidden, weight, tokens = call.hidden, call.weight, call.loss.tokens
    unit, scaled = hidden.new_empty(0, dtype=torch.float32), tokens
    if hidden.dtype == torch.float16:
        unit = tiles.unit_of(_largest_slope(call.loss), exponent=6)  # ratios far from 1 make larger slopes
        scaled = tokens._replace(
            weights=_times(tokens.weights, unit), entropy_weights=_times(tokens.entropy_weights, unit)
        )

    def loss_of(kernel_call: KernelCall, given: Tokens, logp: Tensor, entropy: Tensor) -> loss.Results:
        entropies = entropy.unsqueeze(0) if call.with_entropy else None
        given = given._replace(logp=logp.unsqueeze(0), entropy=entropies)
        return loss.Results(*loss.FORWARD(engine.backend, kernel_call._replace(tokens=given)))

    def slopes(block: slice, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        found = loss_of(call.loss, _some(scaled, block), logp, entropy)
        bonus = call.loss.entropy_gradient
        return found.grad_logp.squeeze(0), found.grad_entropy.squeeze(0) if bonus else None

    chunk = call.chunk_size or _chunk_size(engine, hidden, weight.shape[0])
    tiling = tiles.Tiling(chunk, weight.shape[0], gemm_tokens=0)
    problem = tiles.Problem(engine, hidden, weight, call.rows, tiling)
    needs = (call.need_hidden, call.need_weight, call.need_bias)
    logp, entropy, grad_hidden, grad_weight, grad_bias = tiles.one_pass(
        problem, call.with_entropy, slopes, needs
    )
    without_gradients = call.loss._replace(logp_gradient=False, entropy_gradient=False)
    found = loss_of(without_gradients, tokens, logp, entropy)
    return Results(found.loss, found.metrics, grad_hidden, grad_weight, grad_bias, unit)


def _some(tokens: Tokens, places: slice | Tensor) -> Tokens:
    """What stands at some of the tokens (1, N)."""
    given = tokens._asdict()
    del given["logp"]
    return tokens._replace(
        **{name: values[:, places] for name, values in given.items() if values is not None}
    )


def _times(weights: Any, unit: Tensor) -> Any:
    return None if weights is None else weights * unit


def _largest_slope(call: KernelCall) -> Tensor:
    """An upper bound of |dL/dlogp| and |dL/dentropy| of any token, for ratios near 1."""
    tokens: Any = call.tokens
    kl_coef, entropy_coef = (
        call.numbers[Numbers._fields.index(name)].abs() for name in ("kl_coef", "entropy_coef")
    )
    policy = tokens.advantages
    if tokens.policy_weights is not None:
        policy = policy * tokens.policy_weights
    slopes = tokens.weights.abs() * policy.abs().maximum(kl_coef)
    if call.entropy_gradient:
        of_entropy = tokens.weights if tokens.entropy_weights is None else tokens.entropy_weights
        slopes = slopes.maximum(entropy_coef * of_entropy.abs())
    kept = torch.where(tokens.mask & slopes.isfinite(), slopes, 0.0)
    return torch.cat((kept.squeeze(0), kept.new_zeros(1))).amax()


def _chunk_size(engine: tiles.Engine, hidden: Tensor, vocabulary: int) -> int:
    """As many tokens as the engine likes and memory allows, in chunks of equal size: each reads and writes all of dW."""
    tokens = hidden.shape[0]
    most = max(min(engine.tokens, devices.memory_budget(hidden, CHUNK_BYTES) // (4 * vocabulary)), FEWEST)
    chunks = max(-(-tokens // most), 1)
    return max(-(-tokens // chunks), 1)


for _run, _key, _engine in (
    (one_pass_of_counted, "CPU", cpu.ENGINE),
    (one_pass_of_all, "CUDA", cuda.ENGINE),
    (one_pass_of_all, "CUDA", triton_linear.ENGINE),
    (one_pass_of_counted, "CPU", triton_linear.INTERPRETED_ENGINE),
):
    FORWARD.implement(_engine.backend, _key)(partial(_run, _engine))
