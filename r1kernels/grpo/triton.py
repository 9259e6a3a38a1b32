"""The Triton backend of grpo_loss and group_advantages: which calls it serves, and its ops.

Triton is imported at the first launch, never before. B sequences, T or N tokens (padded or packed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import devices
from . import ops
from .advantages import SCALES
from .cpu import DTYPES
from .options import DEFAULTS

TILES = {"block": 512, "sequences": 32, "slots": 8, "many": 1024}  # see triton_sums.Call
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


def reasons(values: Tensor, *unused: object, **keywords: object) -> tuple[str, ...]:
    """Why this call can not be served; ``values`` are the log-probs, or the rewards."""
    return tuple(devices.triton("tensors", values, DTYPES))


def loss_forward(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logp: Tensor | None,
    policy_weights: Tensor | None,
    entropy: Tensor | None,
    entropy_weights: Tensor | None,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    numbers: Tensor,
    total: Tensor | None,
    variant: int,
    ratio: int,
    kl: int,
    count: int,
    logp_gradient: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``grpo_loss_triton`` (see ops.py), in two launches."""
    from . import triton_kernels, triton_sums

    outputs = ops.empty_outputs(logp, cu_seqlens, ratio, logp_gradient, entropy_gradient)
    *sizes, slots = _sizes(logp, cu_seqlens)
    sums = logp.new_empty(triton_sums.NUM_SUMS, slots)
    given = triton_sums.Tokens(
        logp,
        old_logp,
        advantages,
        mask,
        ref_logp,
        policy_weights,
        entropy,
        entropy_weights,
        weights,
        cu_seqlens,
    )
    values = triton_sums.Numbers(*numbers.tolist())
    name, level = ops.VARIANTS[variant], ops.RATIOS[ratio]
    call = triton_sums.Call(
        variant=name,
        ratio=level,
        kl=ops.ESTIMATORS[kl],
        counted=ops.COUNTS[count],
        token_terms=level == "token" and name not in ("vespo", "gmpo"),
        clips="clip_high" in DEFAULTS[name],
        sequence_advantages=_one_a_sequence(advantages),
        sequence_weights=policy_weights is not None and _one_a_sequence(policy_weights),
        **TILES,
    )
    with torch.cuda.device_of(logp):
        if slots > 0:
            triton_sums.sums_kernel[(slots,)](sums, given, values, *sizes, slots, call, **LAUNCH)
        triton_kernels.loss_kernel[(1 + slots if logp_gradient or entropy_gradient else 1,)](
            sums,
            given,
            values,
            triton_kernels.Outputs(*outputs[:2], *map(_none_if_empty, outputs[2:])),
            total,
            *sizes,
            slots,
            call,
            **LAUNCH,
        )
    return outputs


def loss_backward(
    grad_loss: Tensor,
    grad_logp: Tensor,
    grad_of_ratio: Tensor,
    grad_entropy: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op ``grpo_loss_triton_backward``, in one launch."""
    from . import triton_kernels, triton_sums

    results = torch.empty_like(grad_logp), torch.empty_like(grad_entropy)
    *sizes, slots = _sizes(mask, cu_seqlens)
    if slots > 0:
        grads = map(_none_if_empty, (grad_logp, grad_of_ratio, grad_entropy))
        call = triton_sums.Call(
            variant="",
            ratio="",
            kl="",
            counted="",
            token_terms=False,
            clips=False,
            sequence_advantages=False,
            sequence_weights=False,
            **TILES,
        )
        with torch.cuda.device_of(mask):
            triton_kernels.backward_kernel[(slots,)](
                grad_loss, *grads, mask, cu_seqlens, *results, *sizes, call, **LAUNCH
            )
    return results


def group_advantages(
    rewards: Tensor,
    group_size: int,
    group_ids: Tensor | None,
    valid: Tensor | None,
    scale: int,
    eps: Tensor,
    leave_one_out: bool,
) -> Tensor:
    """The op ``group_advantages_triton``, in one launch."""
    from . import triton_advantages as kernels

    advantages = torch.empty_like(rewards)
    size = rewards.shape[0]
    if size > 0:
        with torch.cuda.device_of(rewards):
            kernels.advantages_kernel[(size,)](
                rewards,
                group_ids,
                valid,
                advantages,
                eps.item(),
                size,
                max(group_size, 1),
                SCALE=SCALES[scale],
                LEAVE_ONE_OUT=leave_one_out,
                OTHERS=kernels.OTHERS,
                num_warps=LAUNCH["num_warps"],
            )
    return advantages


def _sizes(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """N, T (0: packed), B, and the number of slots (see triton_terms.py)."""
    block = TILES["block"]
    if cu_seqlens is None:
        sequences, length = tokens.shape
        return tokens.numel(), length, sequences, sequences * -(-length // block)
    sequences = cu_seqlens.shape[0] - 1
    return tokens.numel(), 0, sequences, tokens.numel() // block + sequences if sequences else 0


def _one_a_sequence(values: Tensor) -> bool:
    """Whether values are (B, 1)."""
    return values.ndim == 2 and values.shape[1] == 1


def _none_if_empty(values: Tensor) -> Tensor | None:
    return values if values.numel() else None


for _key in ("CUDA", "CPU"):  # on the CPU, in Triton's interpreter
    ops.library.impl("grpo_loss_triton", loss_forward, _key)
    ops.library.impl("grpo_loss_triton_backward", loss_backward, _key)
    ops.library.impl("group_advantages_triton", group_advantages, _key)
