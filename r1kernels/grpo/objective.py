"""The hyper-parameters of grpo_loss: what each variant uses, its defaults, and the refusal of everything else."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .casts import numbers_tensor, without_values
from .kl import ESTIMATORS
from .reductions import REDUCTIONS, Totals, check_totals

if TYPE_CHECKING:
    from .loss import LossCall

RATIOS = ("token", "sequence", "output")


class Objective(NamedTuple):
    """The hyper-parameters of ``grpo_loss`` that say what its terms are; ``resolved`` fills in what None stands for."""

    variant: str
    ratio: Any
    clip_low: Any
    clip_high: Any
    delta: Any
    dual_bound: Any
    tau: Any
    vespo: Any
    kl: Any
    kl_coef: float
    entropy_coef: float


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
VARIANTS = tuple(DEFAULTS)
_SPECIFIC = tuple(name for name in Objective._fields if any(name in used for used in DEFAULTS.values()))
# The unbiased KL and the metrics of a variant without a choice of ratio take that of the token.
_UNLESS_GIVEN = {
    variant: {**dict.fromkeys(_SPECIFIC), "ratio": "token", **defaults}
    for variant, defaults in DEFAULTS.items()
}
_FLOATS_AND_BOOL = (*checks.FLOATS, torch.bool)


def has_clip(variant: str) -> bool:
    return "clip_high" in DEFAULTS[variant]


def terms_are_of_tokens(variant: str, ratio: str) -> bool:
    """Whether the term of a token depends on that token alone."""
    return ratio == "token" and variant not in ("vespo", "gmpo")


def resolved(given: Objective, has_reference: bool) -> Objective:
    """The objective with the variant's defaults, or a ValueError that names an argument which the variant does not use."""
    # numbers inside of pairs are no key: True there would be taken for the 1.0 of an earlier call
    numbers_alone = given.tau is None and given.vespo is None
    if numbers_alone and not torch.compiler.is_compiling():
        try:
            return _kept(has_reference, *given)
        except TypeError:  # a list is no key; an error is found again
            pass
    return _resolved(has_reference, *given)


def check_call(call: LossCall, sequences: int, like: Tensor) -> None:
    """Check what a call of B ``sequences`` gives per token, as the tokens of ``like``, and what makes their weights."""
    tokens = call.tokens
    shape = tuple(like.shape)
    for name in ("old_logp", "ref_logp", "entropy", "entropy_weights", "weights"):
        value = getattr(tokens, name)
        if value is not None:
            checks.tensor(name, value, dtypes=checks.FLOATS, shape=shape, like=like)
    policy_weights = tokens.policy_weights
    if policy_weights is not None:
        checks.tensor("policy_weights", policy_weights, dtypes=_FLOATS_AND_BOOL, like=like)
        if tuple(policy_weights.shape) not in ((sequences, 1), shape):
            raise ValueError(
                f"policy_weights: expected shape ({sequences}, 1) or {shape}, got {tuple(policy_weights.shape)}"
            )
    reduction, totals = call.reduction, call.totals
    checks.choice("reduction", reduction, REDUCTIONS)
    if tokens.weights is None:
        check_totals(reduction, totals, like)
        return
    if reduction != "sequence":
        raise ValueError(f"reduction: not used together with weights, got {reduction!r}")
    for name, value in zip(Totals._fields, totals, strict=True):
        if value is not None:
            raise ValueError(f"{name}: not used together with weights, got {value!r}")


def _resolved(has_reference: bool, *values: Any) -> Objective:
    objective = Objective(*values)
    variant = checks.choice("variant", objective.variant, DEFAULTS)
    possible = {name: getattr(objective, name) for name in _SPECIFIC}
    given = {name: value for name, value in possible.items() if value is not None}
    found = _checked(variant, given) if given else _UNLESS_GIVEN[variant]
    kl = _kl_of(objective, has_reference, found["ratio"])
    kl_coef, entropy_coef = (
        checks.number(name, getattr(objective, name)) for name in ("kl_coef", "entropy_coef")
    )
    return Objective(variant, **found, kl=kl, kl_coef=kl_coef, entropy_coef=entropy_coef)


_kept = lru_cache(maxsize=64, typed=True)(_resolved)  # most steps have the objective of the step before


def _checked(variant: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every argument that belongs to variants, the ``given`` ones checked."""
    for name, value in given.items():
        if name not in DEFAULTS[variant]:
            raise ValueError(f"{name}: not used by variant {variant!r}, got {value!r}")
    specific = {**_UNLESS_GIVEN[variant], **given}
    specific["ratio"] = checks.choice("ratio", specific["ratio"], RATIOS)
    for name in ("clip_low", "clip_high"):
        value = specific[name]
        if value is not None and checks.number(name, value) < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    delta, dual_bound, tau, vespo = (specific[name] for name in ("delta", "dual_bound", "tau", "vespo"))
    if delta is not None and checks.number("delta", delta) <= 1 + specific["clip_high"]:
        raise ValueError(
            f"delta: expected above 1 + clip_high = {1 + specific['clip_high']} (it bounds what the clip lets "
            f"through), got {delta}"
        )
    if dual_bound is not None and checks.number("dual_bound", dual_bound) <= 1:
        raise ValueError(f"dual_bound: expected above 1, got {dual_bound}")
    if tau is not None:
        specific["tau"] = _pair("tau", tau, "(for A > 0, for A <= 0)")
        for value in specific["tau"]:
            checks.positive("tau", value)
    if vespo is not None:
        pairs = _pair("vespo", vespo, "((k, lam) for A >= 0, (k, lam) for A < 0)")
        specific["vespo"] = tuple(_pair("vespo", part, "(k, lam)") for part in pairs)
        for k, lam in specific["vespo"]:
            checks.number("vespo", k)
            checks.positive("vespo", lam)
    return specific


def _kl_of(objective: Objective, has_reference: bool, ratio: str) -> str | None:
    """The estimator; None without a reference."""
    kl, kl_coef = objective.kl, objective.kl_coef
    kl_coef = checks.number("kl_coef", kl_coef)
    if not has_reference:
        if kl is not None:
            raise ValueError(f"kl: {kl!r} needs ref_logp, got None")
        if kl_coef != 0:
            raise ValueError(f"kl_coef: {kl_coef} needs ref_logp, got None")
        return None
    found: str = checks.choice("kl", "k3" if kl is None else kl, ESTIMATORS)
    if ratio == "output" and found != "k3":
        raise ValueError(
            f"kl: {found!r} is not used by ratio 'output', whose KL is the k3 of the whole output"
        )
    return found


class Numbers(NamedTuple):
    """The hyper-parameters as kernels use them; 0 where the variant does not."""

    low: float  # clip: 1 - clip_low of the ratio; -clip_low of its log for gmpo
    high: float  # clip: 1 + clip_high of the ratio; clip_high itself for cispo (the ratio) and gmpo (its log)
    delta: float  # grpo: infinity for none
    dual_bound: float  # dual_clip: infinity for the other variants
    tau_positive: float  # sapo: A > 0
    tau_other: float
    k_positive: float  # vespo: A >= 0
    lam_positive: float
    k_negative: float
    lam_negative: float
    kl_coef: float
    entropy_coef: float
    divisor: float


def constants_of(objective: Objective, divisor: float) -> tuple[Tensor, int, int, int]:
    """What kernels take of the hyper-parameters: Numbers, and the places of variant, ratio and kl."""
    constants = _constants if without_values() else _kept_constants
    return constants(objective, divisor)


def _constants(objective: Objective, divisor: float) -> tuple[Tensor, int, int, int]:
    low = 0.0 if objective.clip_low is None else objective.clip_low
    high = 0.0 if objective.clip_high is None else objective.clip_high
    if objective.variant in ("grpo", "dual_clip"):
        low, high = 1 - low, 1 + high
    else:
        low = -low
    tau_positive, tau_other = objective.tau or (0.0, 0.0)
    (k_positive, lam_positive), (k_negative, lam_negative) = objective.vespo or ((0.0, 0.0), (0.0, 0.0))
    numbers = Numbers(
        low,
        high,
        math.inf if objective.delta is None else objective.delta,
        math.inf if objective.dual_bound is None else objective.dual_bound,
        tau_positive,
        tau_other,
        k_positive,
        lam_positive,
        k_negative,
        lam_negative,
        objective.kl_coef,
        objective.entropy_coef,
        divisor,
    )
    return (
        numbers_tensor(numbers),
        VARIANTS.index(objective.variant),
        RATIOS.index(objective.ratio),
        ESTIMATORS.index(objective.kl or "k3"),
    )


# most steps have those of the step before; kernels only read them
_kept_constants = lru_cache(maxsize=64)(_constants)


def _pair(name: str, value: Any, meaning: str) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}: expected a pair {meaning}, got {value!r}")
    return value[0], value[1]
