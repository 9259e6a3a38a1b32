"""TRL's functions for log-probs, entropy and its fused head, with r1kernels behind them.

N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils

from ..logprob import linear_logprobs, token_logprobs
from .patching import Replacement, check_signature

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
IGNORED = -100
_FORWARD = ("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
            "logit_scale", "outputs")  # fmt: skip


class ChunkedLogProbs:
    """In place of TRL's autograd function of that name: ``apply`` is ``linear_logprobs``."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of hidden (N, H) under the head, each (N,).

        What ``outputs`` does not name is None; log-probs and entropy are differentiable. Without autocast the head is cast to
        the dtype of ``hidden``. ``chunk_size`` is not used: ``linear_logprobs`` chooses its own.

        Raises:
            ValueError: the head is partitioned by DeepSpeed ZeRO-3, which takes it away before the backward.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError("weight: expected a whole head, got one that DeepSpeed ZeRO-3 partitions")
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        stats = tuple(name for name in OUTPUTS[1:] if name in outputs)
        results = linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            return_entropy="entropy" in outputs,
            stats=stats,
        )
        results = results if isinstance(results, tuple) else (results,)
        found = results[-1] if stats else {}
        entropy = results[1] if "entropy" in outputs else None
        return (results[0], entropy, *(found.get(name) for name in OUTPUTS[1:]))


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probs of ``index``, one token per row (...) or K (..., K), under logits (..., V): ``token_logprobs``.

    ``row_mask`` has the shape of ``index``: 0 gives 0.
    """
    logp: Any = token_logprobs(logits, _kept(index, row_mask), temperature=temperature)
    return logp


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy (...), in nats, of every row of logits (..., V). ``chunk_size`` is not used: no softmax is kept."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, targets, return_entropy=True)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs (...) of ``index`` (...) and entropies (...) in one pass; 0 where ``row_mask`` is 0."""
    logp, entropy = token_logprobs(
        logits, _kept(index, row_mask), temperature=temperature, return_entropy=True
    )
    return logp, entropy if entropy_requires_grad else entropy.detach()


def replacements() -> list[Replacement]:
    """What the installed TRL has of these, checked.

    Raises:
        RuntimeError: other parameters or outputs than those known here. Nothing is changed then.
    """
    found = []
    fused: Any = getattr(utils, "_ChunkedLogProbFunction", None)
    if fused is not None:
        forward = getattr(fused, "forward", fused)
        check_signature("trl.trainer.utils._ChunkedLogProbFunction", forward, _FORWARD)
        outputs = inspect.signature(forward).parameters["outputs"].default
        if outputs != OUTPUTS:
            raise RuntimeError(
                f"trl.trainer.utils._ChunkedLogProbFunction: expected the outputs {OUTPUTS}, the installed version has {outputs}"
            )
        found.append(Replacement(fused, ChunkedLogProbs))
    # older versions have less: without temperature and row_mask, or no function of both
    check_signature(
        "trl.trainer.utils.selective_log_softmax",
        utils.selective_log_softmax,
        ("logits", "index", "temperature", "row_mask"),
        required=2,
    )
    check_signature(
        "trl.trainer.utils.entropy_from_logits",
        utils.entropy_from_logits,
        ("logits", "chunk_size"),
        required=1,
    )
    found.append(Replacement(utils.selective_log_softmax, selective_log_softmax))
    found.append(Replacement(utils.entropy_from_logits, entropy_from_logits))
    both = getattr(utils, "selective_log_softmax_and_entropy", None)
    if both is not None:
        check_signature(
            "trl.trainer.utils.selective_log_softmax_and_entropy",
            both,
            ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
        )
        found.append(Replacement(both, selective_log_softmax_and_entropy))
    return found


def _kept(index: Tensor, row_mask: Tensor | None) -> Tensor:
    index = index.to(torch.int64)
    return index if row_mask is None else index.masked_fill(row_mask == 0, IGNORED)
