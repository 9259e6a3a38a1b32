"""verl's policy losses by ``r1kernels.grpo_loss``: the arguments of each, and the metrics that verl logs.

B responses of at most T tokens; x, o: log-probs under the policy and under the one that made the sample; c = exp(x - o).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..grpo import grpo_loss, reduction_weights

_REDUCTIONS = {
    "token-mean": "token",
    "token-sum": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "sequence-sum",
    "seq-mean-token-sum-norm": "constant",
}
_BATCH_INFO = {"dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"}
_METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")


class Call(NamedTuple):
    """What a policy loss of verl is given; its tensors have no gradient here."""

    x: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor  # bool
    mode: str
    config: Any
    rollout: Tensor | None  # weights that correct for the engine that made the sample

    def clip(self) -> tuple[float, float]:
        low, high = (
            self.config.clip_ratio if bound is None else bound
            for bound in (self.config.clip_ratio_low, self.config.clip_ratio_high)
        )
        return low, high

    def option(self, name: str, default: float) -> float:
        """Of ``policy_loss`` in verl's config."""
        value: float | None = getattr(self.config.policy_loss, name, None)
        return default if value is None else value

    def mean(self, values: Tensor) -> float:
        """Over the tokens that count; 0 without any."""
        return float(values.masked_fill(~self.mask, 0).sum() / self.mask.sum().clamp(min=1))

    def weighted(self, weights: Tensor) -> Tensor:
        return weights if self.rollout is None else weights * self.rollout

    def reduction(self, mode: str | None = None) -> dict[str, Any]:
        return _reduction(mode or self.mode, self.mask, dict(self.config.global_batch_info))


Arguments = tuple[dict[str, Any], dict[str, float]]
"""Keywords of ``grpo_loss``, and the metrics that it does not measure."""


def policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """verl's policy loss ``name`` by ``grpo_loss``, with the arguments and metrics of verl's own."""
    term, logged = LOSSES[name]

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
        mask = response_mask != 0
        call = Call(
            log_prob.detach(), old_log_prob, advantages, mask, loss_agg_mode, config, rollout_is_weights
        )
        keywords, metrics = term(call)
        output = grpo_loss(log_prob, old_log_prob, keywords.pop("advantages", advantages), mask, **keywords)
        if not logged:
            return output.loss, {}
        measured = output.metrics.floats()
        found = {
            "actor/pg_clipfrac": measured.get("clip_ratio/region_mean", 0.0),
            "actor/ppo_kl": measured["approx_kl"],
            "actor/pg_clipfrac_lower": 0.0,
            **metrics,
        }
        return output.loss, {one: found[one] for one in logged}

    loss.__name__ = f"r1kernels_{name}"
    return loss


def _vanilla(call: Call) -> Arguments:
    low, high = call.clip()
    bound = call.config.clip_ratio_c
    clip = {"variant": "dual_clip", "dual_bound": bound, "clip_low": low, "clip_high": high}
    far = ((call.x - call.old).exp() > bound) & (call.advantages < 0)
    keywords = {**clip, "policy_weights": call.rollout, **call.reduction()}
    return keywords, {"actor/pg_clipfrac_lower": call.mean(far)}


def _gspo(call: Call) -> Arguments:
    _one_a_response("advantages", call.advantages, call.mask)
    if call.rollout is not None:
        _one_a_response("rollout_is_weights", call.rollout, call.mask)
    low, high = call.clip()
    clip = {"variant": "grpo", "ratio": "sequence", "clip_low": low, "clip_high": high}
    return {**clip, "policy_weights": call.rollout, **call.reduction("seq-mean-token-mean")}, {}


def _sapo(call: Call) -> Arguments:
    tau = (call.config.tau_pos, call.config.tau_neg)
    keywords = {"variant": "sapo", "tau": tau, "policy_weights": call.rollout}
    return {**keywords, **call.reduction("seq-mean-token-mean")}, {}


def _gpg(call: Call) -> Arguments:
    return {"variant": "reinforce", "policy_weights": call.rollout, **call.reduction()}, {}


def _cispo(call: Call) -> Arguments:
    """-sg(clip(c)) A x: here with a lower bound too, so the clipped ratio is a weight of -A x."""
    low, high = call.clip()
    ratio = (call.x - call.old).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    keywords = {"variant": "reinforce", "policy_weights": call.weighted(clipped), **call.reduction()}
    return keywords, {"actor/pg_clipfrac": call.mean(ratio != clipped)}


def _dppo_tv(call: Call) -> Arguments:
    """A token is left out where its probability has moved too far in the direction of its advantage."""
    low, high = call.clip()
    moved = call.x.exp() - call.old.exp()
    return _dppo(call, torch.where(call.advantages > 0, moved <= high, moved >= -low))


def _dppo_kl(call: Call) -> Arguments:
    """The distance is the KL divergence of (the token, all others)."""
    low, high = call.clip()
    p, q = call.x.exp(), call.old.exp()
    tiny = 1e-8  # verl's
    distance = q * (call.old - call.x) + (1 - q) * ((1 - q + tiny) / (1 - p + tiny)).log()
    near = torch.where(call.advantages > 0, (distance <= high) | (p <= q), (distance <= low) | (p >= q))
    return _dppo(call, near)


def _dppo(call: Call, kept: Tensor) -> Arguments:
    bound = call.config.clip_ratio_c
    keywords = {
        "variant": "cispo",
        "clip_high": bound,
        "policy_weights": call.weighted(kept.to(call.x.dtype)),
    }
    far = ((call.x - call.old).exp() > bound) & kept
    metrics = {"actor/pg_clipfrac": call.mean(~kept), "actor/pg_clipfrac_lower": call.mean(far)}
    return {**keywords, **call.reduction()}, metrics


def _clip_cov(call: Call) -> Arguments:
    """A few tokens, drawn from those with a large covariance of log-prob and advantage, are left out."""
    low, high = call.clip()
    ratio = (call.x - call.old).exp()
    clipped = -call.advantages * ratio.clamp(1 - low, 1 + high) > -call.advantages * ratio
    covariance = (call.advantages - call.mean(call.advantages)) * (call.x - call.mean(call.x))
    large = (covariance > call.option("clip_cov_lb", 1.0)) & (covariance < call.option("clip_cov_ub", 5.0))
    places = (large & call.mask & ~clipped).nonzero()
    count = max(int(call.option("clip_cov_ratio", 0.0002) * int(call.mask.sum())), 1)
    rows, columns = places[torch.randperm(len(places))[:count]].unbind(1)
    kept = torch.ones_like(call.x)
    kept[rows, columns] = 0
    clip = {"variant": "grpo", "clip_low": low, "clip_high": high, "policy_weights": call.weighted(kept)}
    return {**clip, **call.reduction()}, {"actor/pg_clipfrac": call.mean(kept == 0)}


def _kl_cov(call: Call) -> Arguments:
    """-c A, and on the few tokens with the largest covariance of log-prob and advantage coef |x - o| besides."""
    counted = call.mask.reshape(-1).nonzero().squeeze(1)
    x, advantages = call.x.reshape(-1)[counted], call.advantages.expand_as(call.x).reshape(-1)[counted]
    covariance = (advantages - advantages.mean()) * (x - x.mean())
    count = max(int(len(counted) * call.option("kl_cov_ratio", 0.0002)), 1) if len(counted) else 0
    chosen = torch.zeros_like(call.mask).reshape(-1)
    chosen[counted[covariance.topk(count).indices]] = True
    # elsewhere the reference is the policy itself: no KL
    reference = torch.where(chosen.view_as(call.mask), call.old, call.x)
    no_clip = {"variant": "grpo", "clip_low": 1.0, "clip_high": 1e30}
    kl = {"ref_logp": reference, "kl": "abs", "kl_coef": call.option("ppo_kl_coef", 1.0)}
    return {**no_clip, **kl, **_weights(call)}, {"actor/ppo_kl": call.mean((call.x - call.old).abs())}


def _dro(call: Call) -> Arguments:
    """-(A x - beta / 2 (x - o)^2)."""
    beta = call.option("dro_beta", 0.0)
    if beta <= 0:
        raise ValueError(f"dro_beta: expected a number above 0, got {beta}")
    kl = {"ref_logp": call.old, "kl": "k2", "kl_coef": beta}
    return {"variant": "reinforce", **kl, **_weights(call)}, {}


def _geo_mean(call: Call) -> Arguments:
    """A mean over all responses of -A times the geometric mean of clipped ratios."""
    low, high = call.clip()
    tokens = call.mask.sum(-1, keepdim=True).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.masked_fill(~call.mask, 0).sum(-1, keepdim=True) / tokens

    weights = None if call.rollout is None else mean((call.rollout + 1e-10).log()).exp()  # verl's
    moved = call.x - call.old
    outside = moved != moved.clamp(-low, high)
    metrics = {
        "actor/pg_clipfrac": call.mean(outside & (call.advantages > 0)),
        "actor/pg_clipfrac_lower": call.mean(outside & (call.advantages < 0)),
    }
    keywords = {"variant": "gmpo", "clip_low": low, "clip_high": high, "policy_weights": weights}
    totals = {"reduction": "sequence", "num_sequences": max(1, call.mask.shape[0])}
    return {**keywords, **totals, "advantages": mean(call.advantages)}, metrics


LOSSES: dict[str, tuple[Callable[[Call], Arguments], tuple[str, ...]]] = {
    "vanilla": (_vanilla, _METRICS),
    "gspo": (_gspo, _METRICS),
    "sapo": (_sapo, _METRICS),
    "gpg": (_gpg, ()),
    "cispo": (_cispo, _METRICS),
    "clip_cov": (_clip_cov, _METRICS[:2]),
    "dppo_kl": (_dppo_kl, _METRICS),
    "dppo_tv": (_dppo_tv, _METRICS),
    "dro": (_dro, _METRICS[1:2]),
    "geo_mean": (_geo_mean, _METRICS),
    "kl_cov": (_kl_cov, _METRICS[1:2]),
}
"""The losses by verl's names, with the metrics that verl logs of each."""


def _weights(call: Call) -> dict[str, Any]:
    """The weights of the tokens where those of the rollout multiply the KL too."""
    reduction = call.reduction()
    if call.rollout is None:
        return reduction
    return {"weights": call.weighted(reduction_weights(call.mask, **reduction))}


def _one_a_response(name: str, values: Tensor, mask: Tensor) -> None:
    if not values.numel():
        return
    lowest = values.masked_fill(~mask, math.inf).amin(-1)
    highest = values.masked_fill(~mask, -math.inf).amax(-1)
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
