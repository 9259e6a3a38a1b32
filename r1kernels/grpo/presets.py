"""The published losses by name: variant, ratio, reduction and clips together."""

from __future__ import annotations

from typing import Any

from .. import checks

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeek-R1 (2501.12948): the ratio of a whole output, clip 10, KL 0.001
    "r1": {
        "variant": "grpo",
        "ratio": "output",
        "clip_low": 10.0,
        "clip_high": 10.0,
        "kl": "k3",
        "kl_coef": 0.001,
        "reduction": "sequence",
    },
    # DeepSeekMath (2402.03300)
    "grpo": {"variant": "grpo", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "reduction": "sequence"},
    "bnpo": {"variant": "grpo", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "reduction": "token"},
    # Dr. GRPO (2503.20783); goes with group_advantages(scale="none") and wants max_length
    "dr_grpo": {
        "variant": "grpo",
        "ratio": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "reduction": "constant",
    },
    # DAPO (2503.14476): the upper clip is wider, no KL
    "dapo": {"variant": "grpo", "ratio": "token", "clip_low": 0.2, "clip_high": 0.28, "reduction": "token"},
    # PPO with a second clip for A < 0 (1912.09729)
    "dual_clip": {
        "variant": "dual_clip",
        "ratio": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_bound": 3.0,
        "reduction": "token",
    },
    # GSPO (2507.18071)
    "gspo": {
        "variant": "grpo",
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "reduction": "sequence",
    },
    # LUSPO (2602.05261): GSPO's term times the length
    "luspo": {
        "variant": "grpo",
        "ratio": "sequence",
        "clip_low": 2e-3,
        "clip_high": 2.5e-3,
        "reduction": "sequence-sum",
    },
    # CISPO (2506.13585) with the bound of ScaleRL (2510.13786)
    "cispo": {"variant": "cispo", "ratio": "token", "clip_high": 5.0, "reduction": "token"},
    # SAPO (2511.20347)
    "sapo": {"variant": "sapo", "ratio": "token", "tau": (1.0, 1.05), "reduction": "sequence"},
    # VESPO (2602.10693)
    "vespo": {"variant": "vespo", "vespo": ((2.0, 3.0), (3.0, 2.0)), "reduction": "token"},
    # GMPO (2507.20673)
    "gmpo": {"variant": "gmpo", "clip_low": 0.4, "clip_high": 0.4, "reduction": "sequence"},
    # GPG (2504.02546): the plain policy gradient
    "gpg": {"variant": "reinforce", "reduction": "token"},
}


def grpo_preset(name: str) -> dict[str, Any]:
    """The keywords of ``grpo_loss`` that a published loss consists of.

    ``grpo_loss(logp, old_logp, advantages, mask, **grpo_preset("dapo"), num_tokens=total)``

    Args:
        name: one of r1, grpo, bnpo, dr_grpo, dapo, dual_clip, gspo, luspo, cispo, sapo, vespo, gmpo, gpg. "r1" is the
            objective as the paper writes it, at output level, and needs ``ref_logp``; public trainers run "grpo".

    Returns:
        A new dict of variant, ratio, reduction and clips; change it freely. Totals and max_length are the caller's.

    Raises:
        ValueError: an unknown name.
    """
    return dict(PRESETS[checks.choice("name", name, PRESETS)])
