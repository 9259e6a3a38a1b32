"""The torch ops of linear_logprobs: schemas, fakes and the implementation by tiles, for the backends that have an engine.

linear_logprobs_<backend>(hidden, weight, *rows, entropy, extra, chunk_size, save_logits, batch_invariant)
        -> (logp, entropy, stats, extra, logits)
    hidden        (N, H), weight (V, H), of one dtype: float32, bfloat16 or float16
    rows          as in ops.py, for N tokens and V columns
    chunk_size    tokens a tile; 0: chosen
    logp, entropy, stats, extra  as the row ops give them
    logits        (N, V) float32, raw, with save_logits; else (0,)
linear_logprobs_<backend>_backward(hidden, weight, *rows, chunk_size, logp, stats, grad_logp, grad_entropy, sequences,
        needs_hidden, needs_weight, needs_bias) -> (grad_hidden, grad_weight, grad_bias)
    the logits are computed once more; gradients in the dtype of the inputs, that of the bias in float32; (0,) where
    not needed; of a slab (ops.py) grad_hidden is in float32, to be summed over the slabs
linear_logprobs_<backend>_backward_(logits, hidden, ...the same...) -> ...
    from the logits of the forward, which are overwritten
linear_logprobs_<backend>_frozen(hidden, weight, *rows, extra, chunk_size) -> (logp, extra, slope)
    of the whole vocabulary, where hidden alone needs a gradient: slope (N, H) float32 is d logp / d hidden
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import frozen, ops, tiles

_INPUTS = f"Tensor hidden, Tensor weight, {ops.ROWS}"
_FORWARD = "bool entropy, bool extra, SymInt chunk_size, bool save_logits, bool batch_invariant"
_BACKWARD = f"SymInt chunk_size, {ops.GRADS}, bool needs_hidden, bool needs_weight, bool needs_bias"
_OUTPUTS = "(Tensor logp, Tensor entropy, Tensor stats, Tensor extra, Tensor logits)"
_GRADIENTS = "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"


def define(backend: str) -> None:
    """The schemas and fakes of a backend's ops."""
    name = f"linear_logprobs_{backend}"
    ops.library.define(f"{name}({_INPUTS}, {_FORWARD}) -> {_OUTPUTS}")
    ops.library.define(f"{name}_backward({_INPUTS}, {_BACKWARD}) -> {_GRADIENTS}")
    ops.library.define(f"{name}_backward_(Tensor(a!) logits, {_INPUTS}, {_BACKWARD}) -> {_GRADIENTS}")
    ops.library.define(
        f"{name}_frozen({_INPUTS}, bool extra, SymInt chunk_size) -> (Tensor logp, Tensor extra, Tensor slope)"
    )
    torch.library.register_fake(f"r1kernels::{name}", _fake_forward, lib=ops.library)
    torch.library.register_fake(f"r1kernels::{name}_backward", _fake_backward, lib=ops.library)
    torch.library.register_fake(f"r1kernels::{name}_backward_", _fake_backward_of_saved, lib=ops.library)
    torch.library.register_fake(f"r1kernels::{name}_frozen", _fake_frozen, lib=ops.library)


def implement(engine: tiles.Engine, key: str) -> None:
    """The ops of a backend for tensors of one dispatch key, by the tile loop over its engine."""

    def forward(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *rows, entropy, extra, chunk_size, save_logits, batch_invariant = arguments
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        tiling = tiles.tiling_of(engine, hidden, vocabulary, chunk_size, batch_invariant)
        problem = tiles.Problem(engine, hidden, weight, ops.Rows(*rows), tiling)
        logits = engine.empty(hidden, (tokens, vocabulary) if save_logits else (0,), torch.float32)
        if engine.forward is not None and (batch_invariant or not save_logits):
            results = engine.forward(hidden, weight, problem.rows, entropy, extra, batch_invariant)
            if results is not None:
                # tiles beside it: whether they are kept must move no bit of a batch-invariant result
                if save_logits:
                    tiling = tiles.tiling_of(engine, hidden, vocabulary, chunk_size, False)
                    tiles.logits(problem._replace(tiling=tiling), logits)
                return *results, logits
        return *tiles.forward(problem, entropy, extra, logits if save_logits else None), logits

    def backward(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return gradients(None, hidden, weight, *arguments)

    def gradients(
        logits: Tensor | None, hidden: Tensor, weight: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        (
            *rows,
            chunk_size,
            logp,
            stats,
            grad_logp,
            grad_entropy,
            sequences,
            for_hidden,
            for_weight,
            for_bias,
        ) = arguments
        tiling = tiles.tiling_of(engine, hidden, weight.shape[0], chunk_size, False)
        problem = tiles.Problem(engine, hidden, weight, ops.Rows(*rows), tiling)
        needs = (for_hidden, for_weight, for_bias)
        return tiles.backward(problem, logits, logp, stats, grad_logp, grad_entropy, sequences, needs)

    def of_frozen_head(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *rows, extra, chunk_size = arguments
        tiling = tiles.tiling_of(engine, hidden, weight.shape[0], chunk_size, False)
        return frozen.forward(tiles.Problem(engine, hidden, weight, ops.Rows(*rows), tiling), extra)

    name = f"linear_logprobs_{engine.backend}"
    ops.library.impl(name, forward, key)
    ops.library.impl(f"{name}_backward", backward, key)
    ops.library.impl(f"{name}_backward_", gradients, key)
    ops.library.impl(f"{name}_frozen", of_frozen_head, key)


def _fake_forward(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *rows, entropy, extra, _, save_logits, _ = arguments
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    whole = ops.Rows(*rows).vocabulary == vocabulary
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(tokens if entropy and whole else 0, dtype=torch.float32),
        hidden.new_empty((3, tokens), dtype=torch.float32),
        hidden.new_empty((3 if extra else 0, tokens), dtype=torch.float32),
        hidden.new_empty((tokens, vocabulary) if save_logits else 0, dtype=torch.float32),
    )


def _fake_backward(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    for_hidden, for_weight, for_bias = arguments[-3:]
    rows = ops.Rows(*arguments[: len(ops.Rows._fields)])
    dtype = tiles.hidden_gradient_dtype(hidden, weight, rows)
    return (
        hidden.new_empty(hidden.shape if for_hidden else 0, dtype=dtype),
        weight.new_empty(weight.shape if for_weight else 0),
        weight.new_empty(weight.shape[0] if for_bias else 0, dtype=torch.float32),
    )


def _fake_backward_of_saved(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_backward(*arguments)


def _fake_frozen(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    extra, tokens = arguments[-2], hidden.shape[0]
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty((3 if extra else 0, tokens), dtype=torch.float32),
        hidden.new_empty(hidden.shape, dtype=torch.float32),
    )


for _backend in ops.BACKENDS:
    define(_backend)
