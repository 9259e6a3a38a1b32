"""Keeping the experts evenly loaded: the selection bias of DeepSeek-V3 and the auxiliary losses.

T tokens, E experts, K experts per token, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..op import Op
from . import reference
from .sort import check_ascending

_INTEGERS = (torch.int32, torch.int64)


def update_router_bias(bias: Tensor, tokens_per_expert: Tensor, rate: float) -> None:
    """Move the selection bias of a router one step towards an even load, in place (aux-loss-free balancing).

    d_e = rate * sign(mean(count) - count_e), then bias += d - mean(d): experts with fewer tokens than the mean
    are chosen more easily from now on, and the mean of the bias stays where it was.

    Call it once per optimizer step, with the counts of all micro-batches and ranks added up.

    Args:
        bias: (E,), the ``bias`` of ``route``; changed in place, outside of autograd.
        tokens_per_expert: (E,), int32 or int64, as ``route`` returns it or sums of that.
        rate: the step, at least 0 (0.001 in DeepSeek-V3).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a negative rate.

    Precision: the comparison with the mean is exact (in integers); d is in the dtype of the bias. Deterministic.

    Source: arXiv 2408.15664 and DeepSeek-V3 (2412.19437); centring d as torchtitan does.
    """
    checks.tensor("bias", bias, dtypes=checks.FLOATS, ndim=1)
    checks.tensor("tokens_per_expert", tokens_per_expert, dtypes=_INTEGERS, shape=(bias.shape[0],), like=bias)
    if checks.number("rate", rate) < 0:
        raise ValueError(f"rate: expected a number of at least 0, got {rate}")
    UPDATE_ROUTER_BIAS(None, bias, tokens_per_expert, float(rate))


def sequence_balance_loss(scores: Tensor, indices: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    r"""The complementary sequence-wise balance loss of DeepSeek-V3, one value per sequence.

    .. math:: \alpha \sum_e f_e P_e, \qquad f_e = \frac{E}{K L} count_e, \qquad
              P_e = \frac{1}{L} \sum_t \frac{s_{te}}{\sum_j s_{tj}}

    with the sums over the L tokens of the sequence. f_e gets no gradient.

    Args:
        scores: (T, E), the unbiased scores (sigmoid of the logits), not negative, with gradient.
        indices: (T, K) int64, the chosen experts; entries outside [0, E) do not count on CUDA.
        cu_seqlens: (B + 1,), int32 or int64, ascending: sequence b holds the tokens cu_seqlens[b] to
            cu_seqlens[b + 1]. Tokens outside of all sequences (padding) are left out.
        alpha: the weight of the loss (0.0001 in DeepSeek-V3).

    Returns:
        (B,), float32 (float64 for float64 scores); 0 for an empty sequence.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, cu_seqlens that do not ascend.
        IndexError: an index out of range (on the CPU; on CUDA with ``debug_checks(True)``).

    Precision: float32 accumulation. Deterministic on the CPU; on CUDA the reference adds tokens up with atomics, so
    there it is deterministic under ``torch.use_deterministic_algorithms(True)`` only.

    Source: DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20.
    """
    checks.tensor("scores", scores, dtypes=checks.FLOATS, ndim=2)
    checks.tensor("indices", indices, dtypes=(torch.int64,), shape=(scores.shape[0], None), like=scores)
    checks.tensor("cu_seqlens", cu_seqlens, dtypes=_INTEGERS, ndim=1, like=scores)
    alpha = checks.number("alpha", alpha)
    if indices.shape[1] == 0:
        raise ValueError("indices: expected shape (T, K) with K >= 1, got K = 0")
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: expected shape (B + 1,), got an empty tensor")
    if checks.values_visible(indices, cu_seqlens):
        checks.in_range("indices", indices, 0, scores.shape[1])
        check_ascending("cu_seqlens", cu_seqlens, scores.shape[0])
    return SEQUENCE_BALANCE_LOSS(None, scores, indices, cu_seqlens, float(alpha))


def load_balancing_loss(logits: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    r"""The load balancing loss of Switch Transformer for top-k softmax routers, as transformers computes it.

    .. math:: E \sum_e \frac{count_e}{T} \cdot \frac{1}{T} \sum_t softmax(logits_t)_e

    where count_e is how often e is among the ``top_k`` experts of a token (no gradient): K for a perfectly even load.

    Args:
        logits: (T, E), float32, bfloat16, float16 or float64. For one loss over several layers, as transformers does,
            concatenate their logits (and repeat the mask).
        top_k: K, in [1, E].
        mask: (T,), bool or numbers: how often a token counts, in T too; False or 0 leaves it out (padding), 3 counts a token
            that stands for three (``PrefixTree.multiplicity``).

    Returns:
        a scalar, float32 (float64 for float64 logits); 0 without tokens.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or size.

    Precision: float32 accumulation; ties go to the lowest index. Deterministic.

    Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6.
    """
    checks.tensor("logits", logits, dtypes=checks.FLOATS, ndim=2)
    top_k = checks.integer("top_k", top_k, minimum=1)
    if top_k > logits.shape[1]:
        raise ValueError(f"top_k: expected at most the {logits.shape[1]} experts, got {top_k}")
    if mask is not None:
        checks.tensor("mask", mask, shape=(logits.shape[0],), like=logits)
    return LOAD_BALANCING_LOSS(None, logits, top_k, mask)


def router_z_loss(logits: Tensor) -> Tensor:
    r"""The z-loss of ST-MoE, which keeps router logits small: the mean over tokens of logsumexp(logits)^2.

    Args:
        logits: (T, E) with E >= 1, float32, bfloat16, float16 or float64.

    Returns:
        a scalar, float32 (float64 for float64 logits); 0 without tokens.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.

    Precision: float32 accumulation. Deterministic.

    Source: ST-MoE (arXiv 2202.08906), equation 5.
    """
    checks.tensor("logits", logits, dtypes=checks.FLOATS, ndim=2)
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape (T, E) with E >= 1, got {tuple(logits.shape)}")
    return ROUTER_Z_LOSS(None, logits)


# plain PyTorch: a handful of passes over (T, E) or (E,), once a layer or step, that take a fraction of the router's time
UPDATE_ROUTER_BIAS = Op("update_router_bias", reference.update_router_bias)
SEQUENCE_BALANCE_LOSS = Op("sequence_balance_loss", reference.sequence_balance_loss)
LOAD_BALANCING_LOSS = Op("load_balancing_loss", reference.load_balancing_loss)
ROUTER_Z_LOSS = Op("router_z_loss", reference.router_z_loss)
