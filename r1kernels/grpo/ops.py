"""The torch ops of grpo_loss and group_advantages: schemas and fakes, for the backends cpu, cuda and triton.

They exist without the extension; it (cpu, cuda) and triton.py add the implementations. Called from autograd.py.
B sequences of T tokens; "tokens" is (B, T), or packed (N,) with cu_seqlens. All tensors are contiguous.

    grpo_loss_<backend>(logp, ..., entropy_gradient) -> (loss, metrics, grad_logp, grad_of_ratio, grad_entropy)
        logp, old_logp, ref_logp, entropy, entropy_weights, weights
                          float32 tokens; None: not given (old_logp: the policy itself; weights: by ``divisor``, below)
        advantages, policy_weights
                          float32, tokens, or (B, 1): one a sequence
        mask              bool or integer tokens
        cu_seqlens        int32 or int64 (B + 1,), or None: padded
        numbers           float32 (13,) on the CPU, see ``NUMBERS``; a tensor, for torch.compile specialises float arguments
        total             float32 (1,) on the device, or None for 1
        variant, ratio, kl, count
                          places in ``VARIANTS``, ``RATIOS``, ``ESTIMATORS`` (any without ref_logp) and ``COUNTS``
        logp_gradient, entropy_gradient
                          whether to write the gradients; they are empty (0,) otherwise

        Without ``weights`` the weight of a token is 1 / (divisor * total * count).

        loss              float32 ()
        metrics           float32 (12,): ``metrics.NAMES``; 0 where something was not given
        grad_logp         float32 tokens: dL/dx of each token but for the share below
        grad_of_ratio     float32 (B,), where ratio is "sequence" or "output"; else (0,): dL/dx_t is grad_logp_t plus this,
                          in every counted token of the sequence
        grad_entropy      float32 tokens

    grpo_loss_<backend>_backward(grad_loss, grad_logp, grad_of_ratio, grad_entropy, mask, cu_seqlens)
            -> (grad_logp, grad_entropy)
        grad_loss         float32 (), read on the device; the other arguments are outputs of the forward (empty: not needed)

    group_advantages_<backend>(rewards, group_size, group_ids, valid, scale, eps, leave_one_out) -> advantages
        rewards           float32 (B,); advantages likewise
        group_ids         int64 (B,), or None: runs of ``group_size`` entries are the groups
        valid             bool (B,), or None: all
        scale             a place in ``advantages.SCALES``
        eps               float32 (1,) on the CPU
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .kl import ESTIMATORS as ESTIMATORS
from .metrics import NAMES
from .options import DEFAULTS
from .options import RATIOS as RATIOS

BACKENDS = ("cpu", "cuda", "triton")
VARIANTS = tuple(DEFAULTS)
COUNTS = ("one", "sequence", "batch", "longest")
"""What the divisor of a weight is multiplied by: 1; the counted tokens of the sequence, or of the call (at least 1 each);
the length of the longest packed sequence."""
NUMBERS = (
    "low",  # clip: 1 - clip_low of the ratio; -clip_low of its log for gmpo
    "high",  # clip: 1 + clip_high of the ratio; clip_high itself for cispo (the ratio) and gmpo (its log)
    "delta",  # grpo: infinity for none
    "dual_bound",  # dual_clip: infinity for the other variants
    "tau_positive",  # sapo: A > 0
    "tau_other",
    "k_positive",  # vespo: A >= 0
    "lam_positive",
    "k_negative",
    "lam_negative",
    "kl_coef",
    "entropy_coef",
    "divisor",
)
"""What stands at each place of ``numbers``; 0 where the variant does not use it."""


def numbers_tensor(values: Sequence[float]) -> Tensor:
    """Numbers as ops take them: float32 on the CPU; torch.compile carries numbers that change through it."""
    if not torch.compiler.is_compiling():
        return torch.frombuffer(array("f", values), dtype=torch.float32)
    # a constructor would fix them, a product does not
    one = torch.ones((), dtype=torch.float32, device="cpu")
    return torch.stack([one * value for value in values])


library = torch.library.Library("r1kernels", "FRAGMENT")


def _fake_forward(
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
    return empty_outputs(logp, cu_seqlens, ratio, logp_gradient, entropy_gradient)


def empty_outputs(
    logp: Tensor, cu_seqlens: Tensor | None, ratio: int, logp_gradient: bool, entropy_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the forward, uninitialised."""
    sequences = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shared = logp_gradient and RATIOS[ratio] != "token"
    return (
        logp.new_empty(()),
        logp.new_empty(len(NAMES)),
        logp.new_empty(logp.shape if logp_gradient else (0,)),
        logp.new_empty(sequences if shared else 0),
        logp.new_empty(logp.shape if entropy_gradient else (0,)),
    )


def _fake_backward(
    grad_loss: Tensor, grad_logp: Tensor, grad_of_ratio: Tensor, grad_entropy: Tensor, *unused: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_logp), torch.empty_like(grad_entropy)


def _fake_advantages(rewards: Tensor, *unused: object) -> Tensor:
    return torch.empty_like(rewards)


for _backend in BACKENDS:
    library.define(
        f"grpo_loss_{_backend}(Tensor logp, Tensor? old_logp, Tensor advantages, Tensor mask, Tensor? ref_logp, "
        "Tensor? policy_weights, Tensor? entropy, Tensor? entropy_weights, Tensor? weights, Tensor? cu_seqlens, "
        "Tensor numbers, Tensor? total, int variant, int ratio, int kl, int count, bool logp_gradient, "
        "bool entropy_gradient) "
        "-> (Tensor loss, Tensor metrics, Tensor grad_logp, Tensor grad_of_ratio, Tensor grad_entropy)"
    )
    library.define(
        f"grpo_loss_{_backend}_backward(Tensor grad_loss, Tensor grad_logp, Tensor grad_of_ratio, "
        "Tensor grad_entropy, Tensor mask, Tensor? cu_seqlens) -> (Tensor grad_logp, Tensor grad_entropy)"
    )
    library.define(
        f"group_advantages_{_backend}(Tensor rewards, int group_size, Tensor? group_ids, Tensor? valid, "
        "int scale, Tensor eps, bool leave_one_out) -> Tensor"
    )
    torch.library.register_fake(f"r1kernels::grpo_loss_{_backend}", _fake_forward, lib=library)
    torch.library.register_fake(f"r1kernels::grpo_loss_{_backend}_backward", _fake_backward, lib=library)
    torch.library.register_fake(f"r1kernels::group_advantages_{_backend}", _fake_advantages, lib=library)

namespace = torch.ops.r1kernels
