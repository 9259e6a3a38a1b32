"""r1kernels under verl: its log-prob functions and policy losses. verl is imported when ``patch`` or ``register`` is called.

    from r1kernels.integrations import verl as r1

    r1.patch()                     # linear_cross_entropy and logprobs_from_logits, in this process
    r1.register_policy_losses()    # then actor.policy_loss.loss_mode=r1kernels_vanilla

verl computes in worker processes: name this module where they import their own code (verl's ``external_lib`` of a model).
N tokens, H hidden, V vocabulary, B responses of at most T tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..logprob import linear_logprobs, token_logprobs
from ..logprob.arguments import why_not_overwritable
from .patching import Patch, Replacement, check_signature
from .verl_losses import LOSSES, policy_loss

__all__ = [
    "Patch",
    "among",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "patch",
    "register_policy_losses",
]

_FORWARD = ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
_INTEGERS = (torch.int64, torch.int32)
_sets: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("kept", default=None)
_POLICY_LOSS = ("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config",
                "rollout_is_weights")  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (N,) of labels (...), N in all, under hidden (..., H) and the head (V, H): ``linear_logprobs``.

    With ``dist_process_group`` the head is this rank's part of the vocabulary. Inside of ``among`` both are those among its sets.

    Raises:
        ValueError: a reduction other than "none". TypeError: labels that are no integers.
    """
    if reduction != "none":
        raise ValueError(f"reduction: expected 'none', got {reduction!r}")
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
    labels = checks.tensor("labels", labels, dtypes=_INTEGERS).to(torch.int64)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    logp, entropy = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
        group=dist_process_group,
        kept=_sets.get(),
    )
    return logp, entropy


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs (...) of labels (...) under logits (..., V): ``token_logprobs``, float32.

    ``inplace_backward`` writes the gradient over the logits where they can be overwritten, as verl does; a leaf, a view of
    one, or logits that are not contiguous get a gradient of their own. Inside of ``among`` the log-probs are those among its sets, and
    nothing is overwritten.
    """
    labels = checks.tensor("labels", labels, dtypes=_INTEGERS).to(torch.int64)
    checks.boolean("inplace_backward", inplace_backward)
    checks.tensor("logits", logits, dtypes=checks.FLOATS)
    kept = _sets.get()
    overwritable = kept is None and logits.is_contiguous() and not why_not_overwritable(logits)
    logp: Any = token_logprobs(logits, labels, inplace_backward=inplace_backward and overwritable, kept=kept)
    return logp


@contextmanager
def among(kept: tuple[Tensor, Tensor] | None) -> Iterator[None]:
    """Inside the block the functions above score a token among those that a truncated sampler kept (verl's top_p and top_k).

    Args:
        kept: (ids, offsets) for the flattened labels of a call, as in ``linear_logprobs``; None: the whole vocabulary. verl's rollouts
            carry no sets: who puts them there, such as vLLM's ``sampling_mask``, opens the block around a micro-batch's forward.
    """
    token = _sets.set(kept)
    try:
        yield
    finally:
        _sets.reset(token)


def patch() -> Patch:
    """Let verl compute log-probs by ``linear_cross_entropy`` and ``logprobs_from_logits`` of this module.

    Returns:
        Patch, with ``undo()``; also a context manager.

    Raises:
        ImportError: verl is not installed. ValueError: it is patched already. RuntimeError: its functions have other
            parameters than those known here. Nothing is changed then.
    """
    kernels: Any = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    functional: Any = importlib.import_module("verl.utils.torch_functional")
    if kernels.linear_cross_entropy is linear_cross_entropy:
        raise ValueError("verl: expected a library that is not patched yet, got r1kernels in it")
    check_signature("verl LinearCrossEntropy.forward", kernels.LinearCrossEntropy.forward, _FORWARD)
    check_signature(
        "verl.utils.torch_functional.logprobs_from_logits",
        functional.logprobs_from_logits,
        ("logits", "labels", "inplace_backward"),
    )
    return Patch(
        "verl",
        [
            Replacement(kernels.linear_cross_entropy, linear_cross_entropy),
            Replacement(functional.logprobs_from_logits, logprobs_from_logits),
        ],
    )


def register_policy_losses() -> tuple[str, ...]:
    """Add ``r1kernels_vanilla``, ``r1kernels_gspo``, ... to verl's policy losses and return the names.

    Each is verl's loss of that name computed by ``grpo_loss``, with verl's metrics; clips, thresholds and the aggregation come
    from verl's config. Those of LOSSES that the installed verl has are added: vanilla, gspo (2507.18071), sapo (2511.20347), gpg
    (2504.02546), cispo with both bounds (2506.13585), clip_cov and kl_cov (2505.22617), dppo_tv and dppo_kl (2602.04879), dro
    (2405.19107), geo_mean (2507.20673). KL and entropy terms stay with verl, which adds them itself. Log-ratios are not cut at
    20 (10 for gspo) as verl cuts them. gspo refuses advantages and rollout weights that differ within a response (verl's
    gradient is then that of another objective), and its clip fraction counts a response once. clip_cov draws its tokens from
    torch's generator as verl does.

    Raises:
        ImportError: verl is not installed. RuntimeError: its losses take other arguments than those known here. Nothing is
            changed then.
    """
    algorithms: Any = importlib.import_module("verl.trainer.ppo.core_algos")
    names = [name for name in LOSSES if name in algorithms.POLICY_LOSS_REGISTRY]
    for name in names:
        check_signature(f"verl policy loss {name!r}", algorithms.get_policy_loss_fn(name), _POLICY_LOSS)
    for name in names:
        algorithms.register_policy_loss(f"r1kernels_{name}")(policy_loss(name))
    return tuple(f"r1kernels_{name}" for name in names)
