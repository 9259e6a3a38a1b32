"""Calls of grpo_loss with the batches of tests/grpo/conftest.py."""

from __future__ import annotations

import torch

from r1kernels.grpo import grpo_loss, grpo_preset
from r1kernels.grpo.presets import PRESETS as KNOWN

PRESETS = tuple(KNOWN)


def keywords_of(preset, batch, max_length=11):
    """A preset with KL, entropy bonus and its constant length."""
    keywords = {**grpo_preset(preset), "kl_coef": 0.1, "ref_logp": batch.ref_logp}
    keywords |= {"entropy": batch.entropy, "entropy_coef": 0.05}
    return keywords | ({"max_length": max_length} if keywords["reduction"] == "constant" else {})


def loss_of(batch, **keywords):
    return grpo_loss(batch.logp, batch.old_logp, batch.advantages, batch.mask, **keywords)


def gradients_of(loss, batch):
    return torch.autograd.grad(loss, (batch.logp, batch.entropy), materialize_grads=True)


def loss_and_gradients(batch, preset, **changes):
    """The output of a preset, with ``changes`` of its keywords, and the gradients of log-probs and entropies."""
    output = loss_of(batch, **{**keywords_of(preset, batch), **changes})
    return output, gradients_of(output.loss, batch)
