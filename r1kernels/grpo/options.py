"""The keywords of grpo_loss: what each variant uses, its defaults, and the refusal of everything else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .kl import ESTIMATORS
from .reductions import REDUCTIONS, check_totals

RATIOS = ("token", "sequence", "output")

_CLIP = {"clip_low": 0.2, "clip_high": 0.2}
DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"ratio": "token", **_CLIP, "delta": None},
    "dual_clip": {"ratio": "token", **_CLIP, "dual_bound": 3.0},
    "cispo": {"ratio": "token", "clip_high": 5.0},
    "sapo": {"ratio": "token", "tau": (1.0, 1.05)},
    "vespo": {"vespo": ((2.0, 3.0), (3.0, 2.0))},
    "gmpo": dict(_CLIP),
    "reinforce": {},
}
"""For each variant the arguments that it uses, with their defaults."""

_SPECIFIC = ("ratio", "clip_low", "clip_high", "delta", "dual_bound", "tau", "vespo")
_FLOATS_AND_BOOL = (*checks.FLOATS, torch.bool)


class LossOptions(NamedTuple):
    """Every keyword of ``grpo_loss`` but ``backend``; ``resolve`` fills in what None stands for."""

    variant: str = "grpo"
    ratio: Any = None
    clip_low: Any = None
    clip_high: Any = None
    delta: Any = None
    dual_bound: Any = None
    tau: Any = None
    vespo: Any = None
    ref_logp: Tensor | None = None
    kl_coef: float = 0.0
    kl: Any = None
    policy_weights: Tensor | None = None
    entropy: Any = None
    entropy_coef: float = 0.0
    entropy_weights: Tensor | None = None
    reduction: str = "sequence"
    weights: Tensor | None = None
    num_sequences: Any = None
    num_tokens: Any = None
    max_length: Any = None
    cu_seqlens: Tensor | None = None


def resolve(options: LossOptions) -> LossOptions:
    """The options with the variant's defaults, or a ValueError that names an argument which the variant does not use."""
    variant = checks.choice("variant", options.variant, DEFAULTS)
    defaults = DEFAULTS[variant]
    specific: dict[str, Any] = {}
    for name in _SPECIFIC:
        given = getattr(options, name)
        if given is not None and name not in defaults:
            raise ValueError(f"{name}: not used by variant {variant!r}, got {given!r}")
        specific[name] = defaults.get(name) if given is None else given
    # The unbiased KL and the metrics of a variant without a choice of ratio take that of the token.
    specific["ratio"] = checks.choice("ratio", specific["ratio"] or "token", RATIOS)
    resolved = options._replace(**specific)
    _check_variant(resolved)
    return _with_kl(resolved)


def check_tensors(
    options: LossOptions, sequences: int, old_logp: Tensor | None, advantages: Tensor, like: Tensor
) -> None:
    """Check every tensor of a call against its B ``sequences`` and the tokens of ``like`` (log-probs, or their targets)."""
    tokens = tuple(like.shape)
    if old_logp is not None:
        checks.tensor("old_logp", old_logp, dtypes=checks.FLOATS, shape=tokens, like=like)
    checks.tensor("advantages", advantages, dtypes=checks.FLOATS, like=like)
    if tuple(advantages.shape) not in ((sequences,), (sequences, 1), tokens):
        raise ValueError(
            f"advantages: expected shape ({sequences},), ({sequences}, 1) or {tokens}, got {tuple(advantages.shape)}"
        )
    for name in ("ref_logp", "entropy", "entropy_weights", "weights"):
        value = getattr(options, name)
        if value is not None:
            checks.tensor(name, value, dtypes=checks.FLOATS, shape=tokens, like=like)
    weights = options.policy_weights
    if weights is not None:
        checks.tensor("policy_weights", weights, dtypes=_FLOATS_AND_BOOL, like=like)
        if tuple(weights.shape) not in ((sequences, 1), tokens):
            raise ValueError(
                f"policy_weights: expected shape ({sequences}, 1) or {tokens}, got {tuple(weights.shape)}"
            )
    checks.number("entropy_coef", options.entropy_coef)
    _check_reduction(options, like)


def _check_variant(options: LossOptions) -> None:
    for name in ("clip_low", "clip_high"):
        value = getattr(options, name)
        if value is not None and checks.number(name, value) < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    if options.delta is not None and checks.number("delta", options.delta) <= 1 + options.clip_high:
        raise ValueError(
            f"delta: expected above 1 + clip_high = {1 + options.clip_high} (it bounds what the clip lets through), "
            f"got {options.delta}"
        )
    if options.dual_bound is not None and checks.number("dual_bound", options.dual_bound) <= 1:
        raise ValueError(f"dual_bound: expected above 1, got {options.dual_bound}")
    if options.tau is not None:
        for value in _pair("tau", options.tau, "(for A > 0, for A <= 0)"):
            checks.positive("tau", value)
    if options.vespo is not None:
        for part in _pair("vespo", options.vespo, "((k, lam) for A >= 0, (k, lam) for A < 0)"):
            k, lam = _pair("vespo", part, "(k, lam)")
            checks.number("vespo", k)
            checks.positive("vespo", lam)


def _with_kl(options: LossOptions) -> LossOptions:
    checks.number("kl_coef", options.kl_coef)
    if options.ref_logp is None:
        if options.kl is not None:
            raise ValueError(f"kl: {options.kl!r} needs ref_logp, got None")
        if options.kl_coef != 0:
            raise ValueError(f"kl_coef: {options.kl_coef} needs ref_logp, got None")
        return options
    kl = checks.choice("kl", "k3" if options.kl is None else options.kl, ESTIMATORS)
    if options.ratio == "output" and kl != "k3":
        raise ValueError(f"kl: {kl!r} is not used by ratio 'output', whose KL is the k3 of the whole output")
    return options._replace(kl=kl)


def _check_reduction(options: LossOptions, like: Tensor) -> None:
    checks.choice("reduction", options.reduction, REDUCTIONS)
    totals = {name: getattr(options, name) for name in ("num_sequences", "num_tokens", "max_length")}
    if options.weights is None:
        check_totals(options.reduction, totals, like)
        return
    if options.reduction != "sequence":
        raise ValueError(f"reduction: not used together with weights, got {options.reduction!r}")
    for name, value in totals.items():
        if value is not None:
            raise ValueError(f"{name}: not used together with weights, got {value!r}")


def _pair(name: str, value: Any, meaning: str) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}: expected a pair {meaning}, got {value!r}")
    return value[0], value[1]
