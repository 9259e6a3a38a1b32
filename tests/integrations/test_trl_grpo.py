"""GRPOTrainer's loss by r1kernels: loss, gradient and metrics of the installed TRL's own ``_compute_loss``.

Both run on a stand-in that has what the method asks of a trainer; ``test_trl_run.py`` trains a real one.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple
from unittest import TestCase

import pytest
import torch
from torch import Tensor

trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed: nothing to adapt")

import r1kernels  # noqa: E402
from r1kernels.integrations import trl as r1  # noqa: E402
from r1kernels.integrations import trl_grpo, trl_linear  # noqa: E402

OWN = trainer.GRPOTrainer._compute_loss
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
B, T = 5, 9


class OneProcess:
    """What ``_compute_loss`` asks of an accelerator, for a single process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather

    def unwrap_model(self, model):
        return model

    def reduce(self, tensor, reduction):
        return tensor

    def pad_across_processes(self, tensor, dim, pad_index):
        return tensor


class Completions(NamedTuple):
    """Log-probs and entropies (B, T) of a batch, both with gradient, and the inputs of the loss."""

    logp: Tensor
    entropy: Tensor
    inputs: dict[str, Tensor]


def completions(seed=0, empty=True, drift=0.4):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    old = -noise(B, T).abs() * 2 - 0.1
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
    tools = torch.rand(B, T, generator=generator) > 0.2  # 0: a tool wrote the token
    tools[:, 0] = True
    if empty:
        mask[2] = False
    advantages = noise(B)
    advantages[3:] = torch.tensor([-0.05, 0.05])
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": mask.long(),
        "tool_mask": tools.long(),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(143),
        "old_per_token_logps": old,
        "ref_per_token_logps": old + drift * noise(B, T),
        "sampling_per_token_logps": (old + drift * noise(B, T)).index_put(
            (torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)
        ),
    }
    logp = (old + drift * noise(B, T)).requires_grad_()
    return Completions(logp, noise(B, T).abs().requires_grad_(), inputs)


def stand_in(batch, *, training=True, args=(), **options):
    """Enough of a GRPOTrainer; ``args`` and ``options`` are attributes of its args and of itself."""
    known = {
        "delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
        "steps_per_generation": 6, "entropy_coef_delta": 0.05, "entropy_coef_max": 1.0, "entropy_coef_min": 0.0,
        "entropy_target": 1.0,
    }  # fmt: skip
    attributes = {
        "accelerator": OneProcess(), "model": SimpleNamespace(training=training), "loss_type": "grpo",
        "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
        "vllm_importance_sampling_correction": True, "current_gradient_accumulation_steps": 3,
        "max_completion_length": 13, "aux_loss_enabled": False, "router_aux_loss_coef": 0.1,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "entropy_coef": 0.0,
        "_last_world_entropy": 0.5, "_entropy_window_stats": None,
        "get_off_policy_mask": trainer.GRPOTrainer.get_off_policy_mask,
        "get_gamma_weights": trainer.GRPOTrainer.get_gamma_weights,
    }  # fmt: skip
    found = SimpleNamespace(
        **{**attributes, **options},
        args=SimpleNamespace(**{**known, **dict(args)}),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logp, batch.entropy, torch.tensor(0.7)),
    )
    found.get_high_entropy_mask = trainer.GRPOTrainer.get_high_entropy_mask.__get__(found)
    return found


def assert_same(batch, inputs=None, calls=1, **options):
    """Both losses for one trainer: value, gradient, every metric, and what they leave behind in the trainer."""
    inputs = batch.inputs if inputs is None else inputs
    found = []
    for loss_of in (trl_grpo.compute_loss, OWN):
        one = stand_in(batch, **options)
        for _ in range(calls):
            loss = loss_of(one, None, inputs)
        found.append((loss, torch.autograd.grad(loss, batch[:2], materialize_grads=True), one))
    (loss, gradients, ours), (expected, expected_gradients, theirs) = found

    def explained(text):
        return f"{options}: {text}"

    assert torch.isfinite(expected)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-7, msg=explained)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-7, msg=explained)
    for mode in ("train", "eval"):
        metrics, expected_metrics = dict(ours._metrics[mode]), dict(theirs._metrics[mode])
        assert set(metrics) == set(expected_metrics)
        for name, values in expected_metrics.items():
            assert metrics[name] == pytest.approx(values, rel=2e-5, abs=1e-6, nan_ok=True), (name, options)
    assert ours.entropy_coef == pytest.approx(theirs.entropy_coef)
    assert ours._last_world_entropy == pytest.approx(theirs._last_world_entropy)
    return ours


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_with_every_correction(loss_type, level):
    batch = completions(seed=len(loss_type))
    mask = batch.inputs["completion_mask"] * batch.inputs["tool_mask"]
    drift = (
        (batch.inputs["old_per_token_logps"] - batch.inputs["sampling_per_token_logps"]) * mask
    ).nan_to_num(nan=0)
    by_token = drift.exp().clamp(0.5, 1.3)
    by_sequence = drift.sum(-1, keepdim=True).exp().clamp(max=3.0)
    # TRL refuses VESPO with one weight a sequence when the trainer is made
    corrections = (None, by_token) if loss_type == "vespo" else (None, by_token, by_sequence)
    deltas = (None, 1.5) if loss_type in CLIPPED else (None,)
    kls = ((0.0, False), (0.3, False), (0.3, True))
    cases = itertools.product(deltas, corrections, (None, 0.05), (1.0, 0.4), kls)
    for number, (delta, weights, threshold, quantile, (beta, unbiased)) in enumerate(cases):
        inputs = batch.inputs if weights is None else {**batch.inputs, "importance_sampling_ratio": weights}
        assert_same(
            batch, inputs, training=number % 3 != 0, loss_type=loss_type, importance_sampling_level=level, beta=beta,
            epsilon_high=5.0 if loss_type == "cispo" else 0.28, use_vllm=weights is not None,
            off_policy_mask_threshold=threshold, top_entropy_quantile=quantile,
            args={"delta": delta, "use_bias_correction_kl": unbiased},
        )  # fmt: skip


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_with_advantages_a_token_and_without_tools(loss_type):
    batch = completions(seed=1, empty=False)
    left = ("old_per_token_logps", "sampling_per_token_logps", "tool_mask")
    inputs = {name: value for name, value in batch.inputs.items() if name not in left}
    inputs["advantages"] = batch.inputs["advantages"].unsqueeze(1) * torch.linspace(0.5, 2, T)
    for level in ("token", "sequence"):
        assert_same(
            batch, inputs, loss_type=loss_type, importance_sampling_level=level, beta=0.1,
            off_policy_mask_threshold=0.1, args={"use_bias_correction_kl": True},
        )  # fmt: skip


@pytest.mark.parametrize("lambdas", [(0.0, 2.0), (3.0, 1e-6)])
def test_a_lambda_of_vespo_that_trl_raises(lambdas):
    names = ("vespo_lambda_pos", "vespo_lambda_neg")
    assert_same(completions(seed=2), loss_type="vespo", args=dict(zip(names, lambdas, strict=True)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_bonus_and_auxiliary_loss(loss_type, training):
    batch = completions(seed=3)
    common = {"loss_type": loss_type, "beta": 0.2, "training": training, "_entropy_bonus_enabled": True}
    for quantile in (1.0, 0.5):
        ours = assert_same(
            batch, **common, entropy_coef=0.2, top_entropy_quantile=quantile, aux_loss_enabled=True
        )
        assert "policy_loss" in ours._metrics["train" if training else "eval"]


@pytest.mark.parametrize("loss_type", CLIPPED)
def test_a_delta_below_the_clip_is_left_to_trl(loss_type, monkeypatch):
    monkeypatch.setattr(trl_grpo, "_logged", set())
    batch = completions(seed=7, drift=0.8)
    with TestCase().assertLogs("r1kernels") as log:
        for delta in (0.7, 1.1, 1.28):
            assert_same(batch, loss_type=loss_type, beta=0.1, args={"delta": delta})
    assert "delta is 1.1, not above 1 + epsilon_high; TRL computes it" in "\n".join(log.output)
    one = stand_in(batch, loss_type=loss_type, args={"delta": 1.1})
    r1kernels.set_strict(True)
    try:
        with pytest.raises(r1kernels.BackendError, match="delta is 1.1"):
            trl_grpo.compute_loss(one, None, batch.inputs)
    finally:
        r1kernels.set_strict(False)


@pytest.mark.parametrize("target", [0.1, 10.0])
def test_adaptive_entropy(target):
    batch = completions(seed=4)
    adaptive = {"_entropy_bonus_enabled": True, "use_adaptive_entropy": True, "entropy_coef": 0.2}
    for last, boundary, training in itertools.product((0.05, 20.0), (True, False), (True, False)):
        accelerator = OneProcess()
        accelerator.sync_gradients = boundary
        ours = assert_same(
            batch, calls=2, training=training, accelerator=accelerator, _last_world_entropy=last, **adaptive,
            args={"entropy_target": target},
        )  # fmt: skip
        assert (ours.entropy_coef != 0.2) == (training and boundary)


def test_two_ranks_share_their_metrics():
    class TwoEqualRanks(OneProcess):
        num_processes = 2

        def gather(self, tensor):
            return torch.cat([tensor.reshape(-1)] * 2)

        def reduce(self, tensor, reduction):
            assert reduction == "sum"
            return tensor * 2

    batch = completions(seed=5)
    for loss_type in ("dapo", "cispo", "vespo"):
        assert_same(batch, loss_type=loss_type, accelerator=TwoEqualRanks(), beta=0.1)


def test_an_empty_batch_is_no_loss():
    batch = completions(seed=6)
    inputs = {**batch.inputs, "completion_mask": torch.zeros_like(batch.inputs["completion_mask"])}
    one = stand_in(batch, beta=0.1, _entropy_bonus_enabled=True, entropy_coef=0.1)
    loss = trl_grpo.compute_loss(one, None, inputs)
    assert loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, batch[:2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type: expected one of grpo, sapo, .*, got 'ppo'"),
        (
            {"importance_sampling_level": "word"},
            "importance_sampling_level: expected one of token, sequence, got 'word'",
        ),
        ({"loss_type": "cispo", "args": {"delta": 2.0}}, "delta: not used by loss_type 'cispo', got 2.0"),
        ({"loss_type": "sapo", "args": {"sapo_temperature_pos": 0.0}}, "tau"),
    ],
)
def test_what_is_refused_is_named(options, message):
    batch = completions()
    with pytest.raises(ValueError, match=message):
        trl_grpo.compute_loss(stand_in(batch, **options), None, batch.inputs)


def test_what_needs_log_probs_gets_them():
    batch = completions()
    fitting = {name: value for name, value in batch.inputs.items() if name != "old_per_token_logps"}
    plain = {"accelerator": OneProcess()}
    images = {**fitting, "pixel_values": torch.zeros(1)}
    for inputs, options, reason in (
        (batch.inputs, {}, "old_per_token_logps are given"),
        (fitting, {"loss_type": "vespo"}, "loss_type is vespo"),
        (fitting, {"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold is set"),
        (fitting, {"top_entropy_quantile": 0.5}, "top_entropy_quantile is below 1"),
        (fitting, {"_entropy_bonus_enabled": True}, "there is an entropy bonus"),
        (fitting, {"aux_loss_enabled": True}, "there is an auxiliary loss"),
        (images, {}, "there are images"),
        (fitting, {"args": {"delta": 1.1}}, "delta is not above 1 + epsilon_high"),
        (fitting, {}, "the model is wrapped"),
    ):
        one = stand_in(batch, **{**plain, **options})
        one.accelerator.unwrap_model = lambda model: "another"
        assert trl_linear.why_not(one, None, inputs) == reason
    one = stand_in(batch, loss_type="vespo", accelerator=OneProcess())
    with TestCase().assertLogs("r1kernels") as log:
        for _ in range(2):
            loss = trl_linear.compute_loss(one, None, fitting)
    torch.testing.assert_close(loss, OWN(stand_in(batch, loss_type="vespo"), None, fitting))
    assert "\n".join(log.output).count("not computed from hidden states: loss_type is vespo") == 1
    r1kernels.set_strict(True)
    try:
        with pytest.raises(r1kernels.BackendError, match="loss_type is vespo"):
            trl_linear.compute_loss(one, None, fitting)
    finally:
        r1kernels.set_strict(False)


def test_patch_and_undo():
    assert trainer.GRPOTrainer._compute_loss is OWN
    with r1.patch_loss() as patch:
        assert trainer.GRPOTrainer._compute_loss is trl_grpo.compute_loss
        with pytest.raises(ValueError, match="expected a library that is not patched yet"):
            r1.patch()
        patch.undo()
        assert trainer.GRPOTrainer._compute_loss is OWN
    with r1.patch():
        assert trainer.GRPOTrainer._compute_loss is trl_grpo.compute_loss
    with r1.patch(linear=True):
        assert trainer.GRPOTrainer._compute_loss is trl_linear.compute_loss
    for patch, name in (
        (r1.patch, "linear"),
        (r1.patch, "prefix"),
        (r1.patch, "kept"),
        (r1.patch_loss, "linear"),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a bool, got int"):
            patch(**{name: 3})
    assert trainer.GRPOTrainer._compute_loss is OWN


def more_arguments(self, model, inputs, scale):
    return 0


def new_option(self, model, inputs):
    return self.args.new_option * inputs["new_input"] + inputs.get("other_input", self.new_method())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (more_arguments, r"has \(self, model, inputs, scale\)"),
        (
            new_option,
            r"reads \['inputs\[new_input\]', 'inputs\[other_input\]', 'self.args.new_option', 'self.new_method'\] new",
        ),
    ],
)
def test_a_loss_that_changed_is_refused(monkeypatch, changed, message):
    monkeypatch.setattr(trainer.GRPOTrainer, "_compute_loss", changed)
    own = dict(vars(trainer.GRPOTrainer))
    with pytest.raises(RuntimeError, match=message):
        r1.patch()
    assert dict(vars(trainer.GRPOTrainer)) == own
