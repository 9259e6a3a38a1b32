"""The keywords of grpo_loss: what each variant uses, its defaults, and the refusal of everything else."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .kl import ESTIMATORS
from .reductions import REDUCTIONS, Totals, check_totals

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
# The unbiased KL and the metrics of a variant without a choice of ratio take that of the token.
_UNLESS_GIVEN = {
    variant: {**dict.fromkeys(_SPECIFIC), "ratio": "token", **defaults}
    for variant, defaults in DEFAULTS.items()
}
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
    kl: Any = None
    ref_logp: Tensor | None = None
    kl_coef: float = 0.0
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

    @property
    def totals(self) -> Totals:
        """What is known of the whole optimizer step."""
        return Totals(self.num_sequences, self.num_tokens, self.max_length)


TERMS = LossOptions._fields.index("kl") + 1
"""How many options stand first that say what the terms are: variant, ``_SPECIFIC`` and kl."""


def resolve(options: LossOptions) -> LossOptions:
    """The options with the variant's defaults, or a ValueError that names an argument which the variant does not use."""
    given = (*options[:TERMS], options.kl_coef, options.ref_logp is not None)
    # numbers inside of pairs are no key: True there would be taken for the 1.0 of an earlier call
    numbers_alone = options.tau is None and options.vespo is None
    if numbers_alone and not torch.compiler.is_compiling():
        try:
            return LossOptions(*_kept_terms(*given), *options[TERMS:])
        except TypeError:  # a list is no key; an error is found again
            pass
    return LossOptions(*_terms(*given), *options[TERMS:])


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


def _terms(variant: Any, *values: Any) -> tuple[Any, ...]:
    """The first ``TERMS`` options, of which these were given, then kl_coef and whether there is a reference."""
    checks.choice("variant", variant, DEFAULTS)
    *specific, kl, kl_coef, has_reference = values
    given = {name: value for name, value in zip(_SPECIFIC, specific, strict=True) if value is not None}
    found = _checked(variant, given) if given else _UNLESS_GIVEN[variant]
    return variant, *found.values(), _kl_of(kl, kl_coef, has_reference, found["ratio"])


_kept_terms = lru_cache(maxsize=64, typed=True)(_terms)  # most steps have the terms of the step before


def _checked(variant: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every argument that belongs to variants, the ``given`` ones checked."""
    for name, value in given.items():
        if name not in DEFAULTS[variant]:
            raise ValueError(f"{name}: not used by variant {variant!r}, got {value!r}")
    specific = {**_UNLESS_GIVEN[variant], **given}
    specific["ratio"] = checks.choice("ratio", specific["ratio"] or "token", RATIOS)
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


def _kl_of(kl: Any, kl_coef: float, has_reference: bool, ratio: str) -> str | None:
    """The estimator; None without a reference."""
    checks.number("kl_coef", kl_coef)
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


def _check_reduction(options: LossOptions, like: Tensor) -> None:
    checks.choice("reduction", options.reduction, REDUCTIONS)
    if options.weights is None:
        check_totals(options.reduction, options.totals, like)
        return
    if options.reduction != "sequence":
        raise ValueError(f"reduction: not used together with weights, got {options.reduction!r}")
    for name, value in zip(Totals._fields, options.totals, strict=True):
        if value is not None:
            raise ValueError(f"{name}: not used together with weights, got {value!r}")


def _pair(name: str, value: Any, meaning: str) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}: expected a pair {meaning}, got {value!r}")
    return value[0], value[1]
