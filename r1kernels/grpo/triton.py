"""The Triton backend of grpo_loss and group_advantages: its ops.

Triton is imported at the first launch, never before. B sequences, T or N tokens (padded or packed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import advantages, loss
from .kl import ESTIMATORS
from .objective import RATIOS, VARIANTS, Numbers, has_clip, terms_are_of_tokens
from .reductions import COUNTS
from .reference import SCALES

TILES: dict[str, Any] = {"block": 512, "sequences": 32, "slots": 8, "many": 1024}  # see triton_sums.Call
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


@loss.FORWARD.implement("triton")
def loss_forward(call: loss.KernelCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In two launches."""
    from . import triton_kernels, triton_sums

    given = call.tokens
    results = loss.shapes(call)
    *sizes, slots = _sizes(given.logp, given.cu_seqlens)
    sums = given.logp.new_empty(triton_sums.NUM_SUMS, slots)
    numbers = Numbers(*call.numbers.tolist())
    variant, ratio = VARIANTS[call.variant], RATIOS[call.ratio]
    compiled_for = triton_sums.Call(
        **TILES,
        variant=variant,
        ratio=ratio,
        kl=ESTIMATORS[call.kl],
        counted=COUNTS[call.counted],
        token_terms=terms_are_of_tokens(variant, ratio),
        clips=has_clip(variant),
        sequence_advantages=_one_per_sequence(given.advantages),
        sequence_weights=given.policy_weights is not None and _one_per_sequence(given.policy_weights),
    )
    with torch.cuda.device_of(given.logp):
        if slots > 0:
            triton_sums.sums_kernel[(slots,)](sums, given, numbers, *sizes, slots, compiled_for, **LAUNCH)
        triton_kernels.loss_kernel[(1 + slots if call.logp_gradient or call.entropy_gradient else 1,)](
            sums,
            given,
            numbers,
            loss.Results._make(map(_none_if_empty, results)),
            call.total,
            *sizes,
            slots,
            compiled_for,
            **LAUNCH,
        )
    return results


@loss.BACKWARD.implement("triton")
def loss_backward(call: loss.BackwardCall) -> tuple[Tensor, Tensor]:
    """In one launch."""
    from . import triton_kernels, triton_sums

    grad_loss, *grads, mask, cu_seqlens, logp = call
    results = loss.backward_shapes(call)
    *sizes, slots = _sizes(mask, cu_seqlens)
    if slots > 0:
        with torch.cuda.device_of(mask):
            triton_kernels.backward_kernel[(slots,)](
                grad_loss,
                *map(_none_if_empty, grads),
                mask,
                cu_seqlens,
                logp,
                *results,
                *sizes,
                triton_sums.Call(**TILES),
                **LAUNCH,
            )
    return results


@advantages.FORWARD.implement("triton")
def group_advantages(call: advantages.AdvantagesCall) -> Tensor:
    """In one launch."""
    from . import triton_advantages as kernels

    result = torch.empty_like(call.rewards)
    size = call.rewards.shape[0]
    if size > 0:
        with torch.cuda.device_of(call.rewards):
            kernels.advantages_kernel[(size,)](
                call.rewards,
                call.group_ids,
                call.valid,
                result,
                call.eps.item(),
                size,
                max(call.group_size, 1),
                SCALE=SCALES[call.scale],
                LEAVE_ONE_OUT=call.leave_one_out,
                OTHERS=kernels.OTHERS,
                **LAUNCH,
            )
    return result


def _sizes(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """N, T (0: packed), B, and the number of slots (see triton_terms.py)."""
    block = TILES["block"]
    if cu_seqlens is None:
        sequences, length = tokens.shape
        return tokens.numel(), length, sequences, sequences * -(-length // block)
    sequences = cu_seqlens.shape[0] - 1
    return tokens.numel(), 0, sequences, tokens.numel() // block + sequences if sequences else 0


def _one_per_sequence(values: Tensor) -> bool:
    """Whether values are (B, 1)."""
    return values.ndim == 2 and values.shape[1] == 1


def _none_if_empty(values: Tensor) -> Tensor | None:
    return values if values.numel() else None
