"""The divergence of TRL's DistillationTrainer, with ``linear_divergence`` behind it. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..logprob import linear_divergence
from .patching import Replacement, check_signature

MODULE = "trl.kernels.chunked_divergence"
_FORWARD = ("ctx", "student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias",
            "beta", "temperature", "student_logit_scale", "student_final_logit_softcapping", "teacher_logit_scale",
            "teacher_final_logit_softcapping")  # fmt: skip


class ChunkedDivergence:
    """In place of TRL's autograd function of that name: ``apply`` is ``linear_divergence``."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence, the student's entropy, which has no gradient) of hidden states (N, H) under both heads, each (N,).

        ``beta``: 0 is KL(teacher | student), 1 KL(student | teacher), between them the Jensen-Shannon divergence with that share
        of the teacher. Without autocast a head is cast to the dtype of its hidden states.

        Raises:
            ValueError: a head is partitioned by DeepSpeed ZeRO-3, which takes it away before the backward.
        """
        student = _head(student_hidden, student_weight, student_bias)
        teacher = _head(teacher_hidden, teacher_weight, teacher_bias)
        found: Any = linear_divergence(
            student_hidden,
            student[0],
            teacher_hidden,
            teacher[0],
            kind={0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd"),
            beta=beta,
            temperature=temperature,
            bias=student[1],
            teacher_bias=teacher[1],
            softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            return_entropy=True,
        )
        return found[0], found[1]


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if hasattr(weight, "ds_id"):
        raise ValueError("weight: expected a whole head, got one that DeepSpeed ZeRO-3 partitions")
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def installed() -> bool:
    """Whether the installed TRL (1.16 and newer) has that function."""
    return (
        importlib.util.find_spec("trl.kernels") is not None and importlib.util.find_spec(MODULE) is not None
    )


def replacements() -> list[Replacement]:
    """What the installed TRL has of this, checked.

    Raises:
        ValueError: TRL is patched already. RuntimeError: there is no such function, or it has other parameters.
    """
    if not installed():
        raise RuntimeError(f"{MODULE}: expected TRL 1.16 or newer, the installed version has no such module")
    module = importlib.import_module(MODULE)
    own = module.ChunkedDivergenceFunction
    check_signature(f"{MODULE}.ChunkedDivergenceFunction", getattr(own, "forward", own), _FORWARD)
    return [Replacement(own, ChunkedDivergence)]
