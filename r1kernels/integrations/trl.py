"""r1kernels under TRL (1.15 and newer; the log-prob functions also under older versions).

    from r1kernels.integrations import trl as r1

    with r1.patch():                                   # or patch = r1.patch() ... patch.undo()
        trainer = GRPOTrainer(...)
        trainer.train()

Trainers look these functions up when they call them: a trainer that exists already is served too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl.trainer.grpo_trainer import GRPOTrainer

from .. import checks
from . import trl_divergence, trl_grpo, trl_kept, trl_linear, trl_prefix
from .patching import Patch
from .trl_logprobs import replacements

__all__ = ["Patch", "patch", "patch_divergence", "patch_logprobs", "patch_loss"]


def patch(*, linear: bool = False, prefix: bool = False, kept: bool = False) -> Patch:
    """``patch_logprobs``, ``patch_loss`` and, where TRL has that, ``patch_divergence`` together.

    Args:
        linear: as for ``patch_loss``.
        prefix: ``GRPOTrainer`` computes what the rows of a pass have in common once, in the passes for the old, the reference
            and the new log-probs: a prompt once for all its completions, wherever their rows stand. Log-probs, entropies and
            gradients are those of the repeated form to rounding (``shared_prefix_logprobs``). Images and a model that cannot
            share are errors, when a pass meets them.
        kept: ``GRPOTrainer`` scores a token among those that its generation drew from by top_p, top_k and min_p, in the passes
            for the old, the reference and the new log-probs. Errors, when a pass meets them: vLLM, continuous batching, tools,
            ``rollout_func``, images, an auxiliary loss, a head that is sharded.

    Returns:
        Patch, with ``undo()``; also a context manager.

    Raises:
        TypeError, ValueError, RuntimeError: as ``patch_logprobs`` and ``patch_loss``. Nothing is changed then.
    """
    for name, value in (("linear", linear), ("prefix", prefix), ("kept", kept)):
        checks.boolean(name, value)
    functions = replacements()
    if trl_divergence.installed():
        functions += trl_divergence.replacements()
    trl_grpo.check_trainer()
    methods = [_loss(linear, prefix)]
    if kept:
        trl_kept.check_trainer()
        states = trl_prefix.states if prefix else trl_linear.states
        methods = trl_kept.methods(methods[0][2], states)
    elif prefix:
        trl_prefix.check_trainer()
        methods.append((GRPOTrainer, trl_prefix.METHOD, trl_prefix.logps_and_entropies))
    return Patch("trl", functions, methods)


def patch_logprobs() -> Patch:
    """Let TRL's fused head and its log-prob functions run on ``linear_logprobs`` and ``token_logprobs``.

    That is ``_ChunkedLogProbFunction`` (every trainer with a fused head: SFT, DPO, GRPO, ...), ``selective_log_softmax``,
    ``entropy_from_logits`` and the function of both, in ``trl.trainer.utils`` and wherever TRL has imported them. Results
    are float32. A target of -100 gives 0.

    Raises:
        ValueError: TRL is patched already. RuntimeError: the installed functions have other parameters or outputs than those
            known here. Nothing is changed then.
    """
    return Patch("trl", replacements())


def patch_divergence() -> Patch:
    """Let ``DistillationTrainer`` (TRL 1.16 and newer) compute its divergence by ``linear_divergence``.

    That is ``ChunkedDivergenceFunction``; loss, gradient and entropy are TRL's to rounding, and exact where a logit leads.

    Raises:
        ValueError: TRL is patched already. RuntimeError: the installed TRL has no such function, or one with other parameters.
            Nothing is changed then.
    """
    return Patch("trl", trl_divergence.replacements())


def patch_loss(*, linear: bool = False) -> Patch:
    """Let ``GRPOTrainer`` compute its loss by ``grpo_loss``, for every loss type and option of TRL.

    The loss, its gradient and the logged metrics are TRL's to rounding. One thing is refused that TRL ignores: ``delta``
    with a loss type that has no clip. A ``delta`` of at most 1 + ``epsilon_high`` is left to TRL's own method, with a log line.
    Subclasses that have a ``_compute_loss`` of their own keep it.

    Args:
        linear: go from hidden states to the loss in one op, ``linear_grpo_loss``, where that fits: one optimizer step a
            generation, a model that nothing wraps or shards, none of off-policy mask, top-entropy mask, entropy bonus, auxiliary
            loss, images and VESPO.

    Raises:
        TypeError: ``linear`` is no bool. ValueError: TRL is patched already. RuntimeError: the loss of the installed TRL depends on options or inputs that are
            not known here. Nothing is changed then.
    """
    checks.boolean("linear", linear)
    trl_grpo.check_trainer()
    return Patch("trl", methods=[_loss(linear)])


def _loss(linear: bool, prefix: bool = False) -> tuple[type, str, Callable[..., Any]]:
    if not linear:
        return GRPOTrainer, "_compute_loss", trl_grpo.compute_loss
    return GRPOTrainer, "_compute_loss", trl_linear.compute_loss_shared if prefix else trl_linear.compute_loss
