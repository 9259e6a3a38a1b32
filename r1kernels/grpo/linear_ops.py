"""The torch ops of linear_grpo_loss in one pass: schemas, fakes and the implementation by logprob's tile loop.

N tokens, H hidden, V vocabulary. The tile loop is the one thing of another family that this one uses from inside.

    linear_grpo_loss_<backend>(hidden, weight, *rows, chunk_size, entropy, old_logp, advantages, mask, ref_logp,
            policy_weights, entropy_weights, weights, numbers, variant, kl, bonus, needs_hidden, needs_weight, needs_bias)
            -> (loss, metrics, grad_hidden, grad_weight, grad_bias, unit)
        hidden        (N, H), weight (V, H), of one dtype: float32, bfloat16 or float16
        rows          as in logprob/ops.py, for N tokens and V columns
        chunk_size    tokens whose logits are computed at a time; 0: chosen
        entropy       whether to compute it; bonus: whether it is part of the loss
        old_logp, ..., weights  float32 (N,), or None where that may be; mask bool (N,); only tokens that count are read
        numbers, variant, kl    as in ops.py, with ratio "token" and a term that depends on its token alone
        loss, metrics as in ops.py
        grad_...      float32, (0,) where not needed: the gradients for an upstream gradient of ``unit``. Whoever knows the real
                      one multiplies and rounds once: a small weight (one token of many) is below what 16 bits hold
        unit          float32 (), a power of two
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..logprob import ops as logprob_ops
from ..logprob import tiles
from . import ops
from .metrics import NAMES

CHUNK_BYTES = 1 << 30  # of logits, float32
FEWEST = 256  # tokens a chunk: with fewer the head is read too often

RATIO = ops.RATIOS.index("token")
COUNT = ops.COUNTS.index("one")


class Terms(NamedTuple):
    """What the loss is told about its tokens, in the order of the op's arguments."""

    old_logp: Tensor | None
    advantages: Tensor
    mask: Tensor
    ref_logp: Tensor | None
    policy_weights: Tensor | None
    entropy_weights: Tensor | None
    weights: Tensor
    numbers: Tensor
    variant: int
    kl: int
    bonus: bool

    def of_tokens(self, tokens: slice | Tensor) -> Terms:
        """Those of some tokens: a slice, or their places."""
        per_token = {
            name: values[tokens] for name in _PER_TOKEN if (values := getattr(self, name)) is not None
        }
        return self._replace(**per_token)

    def loss(self, backend: str, logp: Tensor, entropy: Tensor | None, gradients: bool) -> tuple[Tensor, ...]:
        """``grpo_loss_<backend>`` with these tokens as one sequence."""

        def row(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.unsqueeze(0)

        return getattr(ops.namespace, f"grpo_loss_{backend}")(
            row(logp),
            row(self.old_logp),
            row(self.advantages),
            row(self.mask),
            row(self.ref_logp),
            row(self.policy_weights),
            row(entropy),
            row(self.entropy_weights),
            row(self.weights),
            None,
            self.numbers,
            None,
            self.variant,
            RATIO,
            self.kl,
            COUNT,
            gradients,
            gradients and self.bonus,
        )

    def largest_slope(self) -> Tensor:
        """An upper bound of |dL/dlogp| and |dL/dentropy| of any token, for ratios near 1."""
        kl_coef, entropy_coef = (
            self.numbers[ops.NUMBERS.index(name)].abs() for name in ("kl_coef", "entropy_coef")
        )
        policy = self.advantages if self.policy_weights is None else self.advantages * self.policy_weights
        slopes = self.weights.abs() * policy.abs().maximum(kl_coef)
        if self.bonus:
            of_entropy = self.weights if self.entropy_weights is None else self.entropy_weights
            slopes = slopes.maximum(entropy_coef * of_entropy.abs())
        kept = torch.where(self.mask & slopes.isfinite(), slopes, 0.0)
        return torch.cat((kept, kept.new_zeros(1))).amax()

    def times(self, factor: Tensor) -> Terms:
        """Those whose gradients are ``factor`` times as large."""
        of_entropy = self.entropy_weights
        return self._replace(
            weights=self.weights * factor, entropy_weights=None if of_entropy is None else of_entropy * factor
        )


_PER_TOKEN = (
    "old_logp",
    "advantages",
    "mask",
    "ref_logp",
    "policy_weights",
    "entropy_weights",
    "weights",
)
_ROWS = len(logprob_ops.Rows._fields)
_SCHEMA = (
    f"(Tensor hidden, Tensor weight, {logprob_ops.ROWS}, SymInt chunk_size, bool entropy, Tensor? old_logp, "
    "Tensor advantages, Tensor mask, Tensor? ref_logp, Tensor? policy_weights, Tensor? entropy_weights, Tensor weights, "
    "Tensor numbers, int variant, int kl, bool bonus, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor unit)"
)


def implement(engine: tiles.Engine, key: str) -> None:
    """The op of a backend for tensors of one dispatch key."""

    def run(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        rows = logprob_ops.Rows(*arguments[:_ROWS])
        chunk_size, entropy, *given, for_hidden, for_weight, for_bias = arguments[_ROWS:]
        terms, needs = Terms(*given), (for_hidden, for_weight, for_bias)
        if key == "CPU":
            return of_counted_tokens(hidden, weight, rows, chunk_size, entropy, terms, needs)
        # which tokens count is not known on the host
        hidden = hidden.masked_fill(~terms.mask.unsqueeze(1), 0)
        rows = rows._replace(targets=rows.targets.where(terms.mask, rows.ignore_index))
        return of_all_tokens(hidden, weight, rows, chunk_size, entropy, terms, needs)

    def of_counted_tokens(
        hidden: Tensor, weight: Tensor, rows: logprob_ops.Rows, chunk_size: int, entropy: bool, *others: Any
    ) -> tuple[Tensor, ...]:
        """The tokens that do not count cost nothing."""
        terms, needs = others
        counted = terms.mask.nonzero().squeeze(1)
        if counted.shape[0] == hidden.shape[0]:
            return of_all_tokens(hidden, weight, rows, chunk_size, entropy, terms, needs)
        temperatures = None if rows.temperatures is None else rows.temperatures[counted]
        rows = rows._replace(targets=rows.targets[counted], temperatures=temperatures)
        loss, metrics, grad_hidden, *grads = of_all_tokens(
            hidden[counted], weight, rows, chunk_size, entropy, terms.of_tokens(counted), needs
        )
        if needs[0]:
            grad_hidden = grad_hidden.new_zeros(hidden.shape).index_copy_(0, counted, grad_hidden)
        return loss, metrics, grad_hidden, *grads

    def of_all_tokens(
        hidden: Tensor,
        weight: Tensor,
        rows: logprob_ops.Rows,
        chunk_size: int,
        entropy: bool,
        terms: Terms,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        unit = terms.weights.new_ones(())
        if hidden.dtype == torch.float16:
            unit = tiles.unit_of(terms.largest_slope())
        scaled = terms.times(unit)

        def slopes(block: slice, logp: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
            of_block = scaled.of_tokens(block)
            _, _, grad_logp, _, grad_entropy = of_block.loss(
                engine.backend, logp, value if entropy else None, True
            )
            return grad_logp.squeeze(0), grad_entropy.squeeze(0) if terms.bonus else None

        tokens = chunk_size or _chunk_size(engine, hidden.shape[0], weight.shape[0])
        problem = tiles.Problem(
            engine, hidden, weight, rows, tiles.Tiling(tokens, weight.shape[0], gemm_tokens=0)
        )
        logp, value, *grads = tiles.one_pass(problem, entropy, slopes, needs)
        loss, metrics, *_ = terms.loss(engine.backend, logp, value if entropy else None, False)
        return loss, metrics, *grads, unit

    ops.library.impl(f"linear_grpo_loss_{engine.backend}", run, key)


def _chunk_size(engine: tiles.Engine, tokens: int, vocabulary: int) -> int:
    """As many tokens as the engine likes and memory allows, in chunks of equal size."""
    most = max(min(engine.tokens, CHUNK_BYTES // (4 * vocabulary)), FEWEST)
    chunks = max(-(-tokens // most), 1)
    return max(-(-tokens // chunks), 1)


def _fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    for_hidden, for_weight, for_bias = arguments[-3:]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(len(NAMES), dtype=torch.float32),
        hidden.new_empty(hidden.shape if for_hidden else 0, dtype=torch.float32),
        weight.new_empty(weight.shape if for_weight else 0, dtype=torch.float32),
        weight.new_empty(weight.shape[0] if for_bias else 0, dtype=torch.float32),
        hidden.new_empty((), dtype=torch.float32),
    )


for _backend in ops.BACKENDS:
    ops.library.define(f"linear_grpo_loss_{_backend}{_SCHEMA}")
    torch.library.register_fake(f"r1kernels::linear_grpo_loss_{_backend}", _fake, lib=ops.library)
