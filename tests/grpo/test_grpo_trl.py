"""Parity with the loss of the installed TRL: its own ``GRPOTrainer._compute_loss``, called on a stand-in for the trainer."""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r1kernels.grpo import grpo_loss, importance_weights, off_policy_mask, reduction_weights, top_entropy_mask

trainer = pytest.importorskip(
    "trl.trainer.grpo_trainer", reason="TRL is not installed: nothing to compare with"
)

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
REDUCTION = {
    "grpo": "sequence",
    "sapo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "vespo": "token",
    "dr_grpo": "constant",
    "luspo": "sequence-sum",
}
MAX_LENGTH = 13
ACCUMULATION = 3
STEPS_PER_GENERATION = 6
NUM_ITEMS = 143


class OneProcess:
    """What ``_compute_loss`` asks of an accelerator, for a single process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction):
        return tensor

    def pad_across_processes(self, tensor, dim, pad_index):
        return tensor


def trl_loss(batch, loss_type, level, *, delta=None, weights=None, threshold=None, quantile=1.0, beta=0.0,
             unbiased=False, entropy_coef=0.0, old=True):  # fmt: skip
    """The loss and the metrics of TRL."""
    stand_in = SimpleNamespace(
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=unbiased,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
            steps_per_generation=STEPS_PER_GENERATION,
        ),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=5.0 if loss_type == "cispo" else 0.28,
        top_entropy_quantile=quantile,
        off_policy_mask_threshold=threshold,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=ACCUMULATION,
        max_completion_length=MAX_LENGTH,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logp, batch.entropy, None),
        get_off_policy_mask=trainer.GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=trainer.GRPOTrainer.get_gamma_weights,
    )
    stand_in.get_high_entropy_mask = trainer.GRPOTrainer.get_high_entropy_mask.__get__(stand_in)
    inputs = {
        "prompt_ids": torch.zeros(batch.mask.shape[0], 1, dtype=torch.long),
        "prompt_mask": torch.ones(batch.mask.shape[0], 1, dtype=torch.long),
        "completion_ids": torch.zeros(batch.mask.shape, dtype=torch.long),
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "num_items_in_batch": torch.tensor(NUM_ITEMS),
        "sampling_per_token_logps": batch.sampler_logp,
        "ref_per_token_logps": batch.ref_logp,
    }
    if old:
        inputs["old_per_token_logps"] = batch.old_logp
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    loss = trainer.GRPOTrainer._compute_loss(stand_in, None, inputs)
    return loss, stand_in._metrics["train"]


def totals(batch, loss_type):
    """The totals of an optimizer step for which TRL divides by what it divides by."""
    if loss_type in ("dapo", "cispo", "vespo"):
        return {"num_tokens": NUM_ITEMS * ACCUMULATION / STEPS_PER_GENERATION}
    if loss_type == "bnpo":
        return {"num_tokens": batch.mask.sum() * ACCUMULATION}
    sequences = {"num_sequences": batch.mask.shape[0] * ACCUMULATION}
    return {**sequences, "max_length": MAX_LENGTH} if loss_type == "dr_grpo" else sequences


def our_loss(batch, loss_type, level, *, delta=None, weights=None, threshold=None, quantile=1.0, beta=0.0,
             unbiased=False, entropy_coef=0.0, old=True):  # fmt: skip
    """The same loss by ``grpo_loss``."""
    keywords: dict[str, Any] = {"reduction": REDUCTION[loss_type], **totals(batch, loss_type)}
    if loss_type in CLIPPED:
        keywords |= {"ratio": level, "clip_low": 0.2, "clip_high": 0.28, "delta": delta}
    else:
        keywords |= {"variant": loss_type} | ({} if loss_type == "vespo" else {"ratio": level})
    kl = {"ref_logp": batch.ref_logp, "kl_coef": beta, "kl": "unbiased" if unbiased else "k3"} if beta else {}
    selected = []
    if threshold is not None:
        reference = batch.sampler_logp
        selected.append(off_policy_mask(batch.logp, reference, batch.advantages, batch.mask, threshold))
    effective = batch.mask
    if quantile < 1.0:
        effective = top_entropy_mask(batch.entropy, batch.mask, quantile)
        selected.append(effective)
    bonus: dict[str, Any] = {}
    if entropy_coef:
        share = effective / effective.sum().clamp(min=1) / ACCUMULATION
        bonus = {
            "entropy": batch.entropy,
            "entropy_coef": entropy_coef,
            "entropy_weights": share.to(batch.logp.dtype),
        }
    call = (batch.logp, batch.old_logp if old else None)
    if loss_type == "vespo" and selected:
        return selected_vespo(batch, call, selected, weights, keywords, kl, bonus)
    for one in selected:
        weights = one if weights is None else weights * one
    return grpo_loss(*call, batch.advantages, batch.mask, policy_weights=weights, **keywords, **kl, **bonus)


def selected_vespo(batch, call, selected, weights, keywords, kl, bonus):
    """VESPO takes policy weights into w, so tokens are left out by their weight in the loss, and the KL stands apart."""
    w = reduction_weights(batch.mask, keywords["reduction"], num_tokens=keywords["num_tokens"])
    for one in selected:
        w = w * one
    policy = grpo_loss(
        *call, batch.advantages, batch.mask, variant="vespo", weights=w, policy_weights=weights, **bonus
    )
    rest = grpo_loss(*call, torch.zeros_like(batch.advantages), batch.mask, **keywords, **kl)
    return policy._replace(loss=policy.loss + rest.loss)


def assert_same(batch, case, ours, theirs):
    assert torch.isfinite(theirs), case
    torch.testing.assert_close(
        ours, theirs.to(ours.dtype), rtol=2e-6, atol=2e-7, msg=lambda text: f"{case}: {text}"
    )
    inputs = (batch.logp, batch.entropy)
    mine = torch.autograd.grad(ours, inputs, materialize_grads=True)
    reference = torch.autograd.grad(theirs, inputs, materialize_grads=True)
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-7, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_those_of_trl(batch_of, loss_type, level):
    batch = batch_of(seed=len(loss_type), dtype=torch.float32)
    by_token = importance_weights(
        batch.old_logp, batch.sampler_logp, batch.mask, mode="token_truncate", low=0.5, high=1.3
    )
    by_sequence = importance_weights(
        batch.old_logp, batch.sampler_logp, batch.mask, mode="sequence_mask", high=3.0
    )
    # VESPO weighs whole sequences itself and TRL gives it token weights only.
    corrections = (None, by_token) if loss_type == "vespo" else (None, by_token, by_sequence)
    # A VESPO without token ratios is refused by us and warned of by TRL; there the level only enters the unbiased KL.
    kls = [(0.0, False), (0.3, False)] + (
        [] if (loss_type, level) == ("vespo", "sequence") else [(0.3, True)]
    )
    deltas = (None, 1.5) if loss_type in CLIPPED else (None,)
    cases = itertools.product(deltas, corrections, (None, 0.05), (1.0, 0.4), kls)
    for delta, weights, threshold, quantile, (beta, unbiased) in cases:
        options = {
            "delta": delta, "weights": weights, "threshold": threshold, "quantile": quantile, "beta": beta,
            "unbiased": unbiased,
        }  # fmt: skip
        theirs, _ = trl_loss(batch, loss_type, level, **options)
        assert_same(batch, options, our_loss(batch, loss_type, level, **options).loss, theirs)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_bonus_and_missing_old_log_probs(batch_of, loss_type):
    batch = batch_of(seed=3, dtype=torch.float32)
    for quantile in (1.0, 0.5):
        options = {"entropy_coef": 0.2, "quantile": quantile, "beta": 0.1, "unbiased": True, "old": False}
        theirs, _ = trl_loss(batch, loss_type, "token", **options)
        assert_same(batch, options, our_loss(batch, loss_type, "token", **options).loss, theirs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_metrics_are_those_of_trl(batch_of, loss_type, level):
    batch = batch_of(seed=5, dtype=torch.float32, empty=False, drift=1.0)
    _, theirs = trl_loss(batch, loss_type, level, beta=0.1)
    keywords = {"variant": "grpo", "clip_low": 0.2, "clip_high": 0.28}
    if loss_type not in CLIPPED:
        keywords = {"variant": loss_type}
    if loss_type != "vespo":
        keywords["ratio"] = level
    output = grpo_loss(
        batch.logp, batch.old_logp, batch.advantages, batch.mask, ref_logp=batch.ref_logp, kl_coef=0.1,
        entropy=batch.entropy, **keywords,
    )  # fmt: skip
    ours = output.metrics.floats()
    names = {"cispo_clip_ratio": "clip_ratio/high_mean"}
    compared = set()
    for name, values in theirs.items():
        if names.get(name, name) in ours:
            compared.add(name)
            assert ours[names.get(name, name)] == pytest.approx(values[0], rel=1e-5, abs=1e-7), name
    assert {"kl", "entropy"} <= compared
    if loss_type in CLIPPED:
        assert {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} <= compared
    if loss_type == "cispo":
        assert "cispo_clip_ratio" in compared
