"""r1kernels under verl: its log-prob functions and policy losses. verl is imported when ``patch`` or ``register`` is called.

    from r1kernels.integrations import verl as r1

    r1.patch()                     # linear_cross_entropy and logprobs_from_logits, in this process
    r1.register_policy_losses()    # then actor.policy_loss.loss_mode=r1kernels_vanilla

verl computes in worker processes: name this module where they import their own code (verl's ``external_lib`` of a model).
N tokens, H hidden, V vocabulary, B responses of at most T tokens.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..grpo import grpo_loss
from ..logprob import linear_logprobs, token_logprobs
from ..logprob.token import why_not_overwritable
from .patching import Patch, Replacement, check_signature

__all__ = [
    "Patch",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "patch",
    "register_policy_losses",
]

LOSSES = ("vanilla", "gspo", "sapo", "gpg")
"""verl's policy losses that ``register_policy_losses`` adds, as r1kernels_NAME."""

_FORWARD = ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
_POLICY_LOSS = ("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config",
                "rollout_is_weights")  # fmt: skip
_REDUCTIONS = {
    "token-mean": "token",
    "token-sum": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "sequence-sum",
    "seq-mean-token-sum-norm": "constant",
}
_BATCH_INFO = {"dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (N,) of labels (...), N in all, under hidden (..., H) and the head (V, H): ``linear_logprobs``.

    With ``dist_process_group`` the head is this rank's part of the vocabulary.

    Raises:
        ValueError: a reduction other than "none".
    """
    if reduction != "none":
        raise ValueError(f"reduction: expected 'none', got {reduction!r}")
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    logp, entropy = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
        group=dist_process_group,
    )
    return logp, entropy


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs (...) of labels (...) under logits (..., V): ``token_logprobs``, float32.

    ``inplace_backward`` writes the gradient over the logits where they can be overwritten, as verl does; a leaf, a view of
    one, or logits that are not contiguous get a gradient of their own.
    """
    inplace_backward = inplace_backward and logits.is_contiguous() and not why_not_overwritable(logits)
    logp: Any = token_logprobs(logits, labels.to(torch.int64), inplace_backward=inplace_backward)
    return logp


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
    """Add ``r1kernels_vanilla``, ``_gspo``, ``_sapo`` and ``_gpg`` to verl's policy losses and return the names.

    Each is verl's loss of that name computed by ``grpo_loss``; clips, tau and the aggregation come from verl's config. KL and
    entropy terms stay with verl, which adds them itself. Log-ratios are not cut at 20 (10 for gspo) as verl cuts them.
    gspo refuses advantages and rollout weights that differ within a response (verl's gradient is then that of another
    objective), and its clip fraction counts a response once.

    Raises:
        ImportError: verl is not installed. RuntimeError: its losses take other arguments than those known here. Nothing is
            changed then.
    """
    algorithms: Any = importlib.import_module("verl.trainer.ppo.core_algos")
    for name in LOSSES:
        check_signature(f"verl policy loss {name!r}", algorithms.get_policy_loss_fn(name), _POLICY_LOSS)
    for name in LOSSES:
        algorithms.register_policy_loss(f"r1kernels_{name}")(policy_loss(name))
    return tuple(f"r1kernels_{name}" for name in LOSSES)


def policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """verl's policy loss ``name`` by ``grpo_loss``, with the arguments and metrics of verl's own."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError("config: expected verl's actor config, got None")
        # verl fixes the aggregation of these two
        mode = "seq-mean-token-mean" if name in ("gspo", "sapo") else loss_agg_mode
        term = _term(name, config)
        if name == "gspo":
            _one_a_response("advantages", advantages, response_mask)
            if rollout_is_weights is not None:
                _one_a_response("rollout_is_weights", rollout_is_weights, response_mask)
        output = grpo_loss(
            log_prob,
            old_log_prob,
            advantages,
            response_mask,
            policy_weights=rollout_is_weights,
            **term,
            **_reduction(mode, response_mask, dict(config.global_batch_info)),
        )
        if name == "gpg":
            return output.loss, {}
        measured = output.metrics.floats()
        lower = 0.0
        if name == "vanilla":
            far = (log_prob.detach() - old_log_prob > math.log(term["dual_bound"])) & (advantages < 0)
            lower = float((far * response_mask).sum() / response_mask.sum().clamp(min=1))
        return output.loss, {
            "actor/pg_clipfrac": measured.get("clip_ratio/region_mean", 0.0),
            "actor/ppo_kl": measured["approx_kl"],
            "actor/pg_clipfrac_lower": lower,
        }

    loss.__name__ = f"r1kernels_{name}"
    return loss


def _term(name: str, config: Any) -> dict[str, Any]:
    """Variant and options of ``grpo_loss`` for a loss of verl."""
    if name == "gpg":
        return {"variant": "reinforce"}
    if name == "sapo":
        return {"variant": "sapo", "tau": (config.tau_pos, config.tau_neg)}
    low, high = (
        config.clip_ratio if bound is None else bound
        for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    clip = {"clip_low": low, "clip_high": high}
    if name == "gspo":
        return {"variant": "grpo", "ratio": "sequence", **clip}
    return {"variant": "dual_clip", "dual_bound": config.clip_ratio_c, **clip}


def _one_a_response(name: str, values: Tensor, mask: Tensor) -> None:
    counted = mask != 0
    lowest = values.masked_fill(~counted, math.inf).amin(-1)
    highest = values.masked_fill(~counted, -math.inf).amax(-1)
    if bool((highest > lowest).any()):
        raise ValueError(f"{name}: expected one number a response with gspo, got several in one")


def _reduction(mode: str, mask: Tensor, info: dict[str, Any]) -> dict[str, Any]:
    """The reduction with the totals by which verl divides: those of the whole batch over all ranks, where it knows them."""
    if mode not in _REDUCTIONS:
        raise ValueError(f"loss_agg_mode: expected one of {', '.join(_REDUCTIONS)}, got {mode!r}")
    if set(info) - _BATCH_INFO:
        raise ValueError(
            f"global_batch_info: expected {', '.join(sorted(_BATCH_INFO))}, got {', '.join(sorted(info))}"
        )
    ranks = info.get("dp_size", 1)
    if mode == "token-sum":
        return {"reduction": "token", "num_tokens": 1 / ranks}
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    total = info.get(name)
    if total is None:
        if ranks > 1:
            raise ValueError(f"{name}: needed with dp_size {ranks}, got None")
        # verl counts the responses that have a token
        total = (mask.sum() if mode == "token-mean" else (mask.sum(-1) > 0).sum()).clamp(min=1)
    reduction = {"reduction": _REDUCTIONS[mode]}
    if mode == "token-mean":
        return {**reduction, "num_tokens": total / ranks}
    if mode == "seq-mean-token-sum-norm":
        horizon = info.get("loss_scale_factor")
        return {
            **reduction,
            "num_sequences": total / ranks,
            "max_length": mask.shape[-1] if horizon is None else horizon,
        }
    return {**reduction, "num_sequences": total / ranks}
