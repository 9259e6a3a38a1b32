"""torch.compile in one graph, without recompiling for other numbers or shapes, and without reading a value on the host."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from r1kernels.grpo import (
    group_advantages,
    grpo_loss,
    grpo_preset,
    importance_weights,
    linear_grpo_loss,
    off_policy_mask,
    reduction_weights,
    top_entropy_mask,
)
from tests.support.host_reads import NoHostReads

VARIANTS = ("grpo", "dual_clip", "cispo", "sapo", "vespo", "gmpo", "reinforce")


def everything(batch, variant, packed=False, **changes):
    """Arguments and keywords of a call with KL, entropy bonus and policy weights."""
    move = batch.packed if packed else (lambda values: values)
    keywords = {"variant": variant, "ref_logp": move(batch.ref_logp), "kl_coef": 0.1, "kl": "unbiased"}
    keywords |= {"entropy": move(batch.entropy), "entropy_coef": 0.1}
    keywords |= {"policy_weights": torch.full((batch.mask.shape[0], 1), 0.5, dtype=batch.logp.dtype)}
    if packed:
        keywords["cu_seqlens"] = batch.cu_seqlens()
    return (move(batch.logp), move(batch.old_logp), batch.advantages, move(batch.mask)), {
        **keywords,
        **changes,
    }


@pytest.mark.parametrize(("variant", "packed"), [("grpo", False), ("gmpo", False), ("vespo", True)])
def test_one_graph_with_the_numbers_of_eager(batch_of, variant, packed):
    batch = batch_of(seed=30)
    arguments, keywords = everything(batch, variant, packed)
    compiled = torch.compile(grpo_loss, fullgraph=True, backend="aot_eager")
    output, expected = compiled(*arguments, **keywords), grpo_loss(*arguments, **keywords)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.metrics.tensor, expected.metrics.tensor)
    assert output.metrics.floats() == pytest.approx(expected.metrics.floats())
    leaves = (batch.logp, batch.entropy)
    for one, other in zip(
        torch.autograd.grad(output.loss, leaves), torch.autograd.grad(expected.loss, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("preset", ["r1", "gspo"])
def test_the_other_ratios_are_one_graph_too(batch_of, preset):
    batch = batch_of(seed=31)
    keywords = {**grpo_preset(preset), "ref_logp": batch.ref_logp}
    compiled = torch.compile(grpo_loss, fullgraph=True, backend="eager")
    arguments = (batch.logp, batch.old_logp, batch.advantages, batch.mask)
    torch.testing.assert_close(compiled(*arguments, **keywords).loss, grpo_loss(*arguments, **keywords).loss)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_numbers_and_shapes_do_not_recompile(batch_of, variant):
    """By default torch.compile takes the first value of a number and the first shape for fixed, and one more for any: no third."""
    dynamic = None if variant == "grpo" else True
    numbers = {
        "grpo": lambda k: {"clip_low": 0.1 + k / 50, "clip_high": 0.2 + k / 50, "delta": 2 + k / 9},
        "dual_clip": lambda k: {"clip_low": 0.1 + k / 50, "clip_high": 0.2 + k / 50, "dual_bound": 2 + k / 9},
        "cispo": lambda k: {"clip_high": 1.1 + k / 9},
        "sapo": lambda k: {"tau": (1 + k / 9, 1.1 + k / 7)},
        "vespo": lambda k: {"vespo": ((2 + k / 9, 3 + k / 7), (3 + k / 5, 2 + k / 3))},
        "gmpo": lambda k: {"clip_low": 0.1 + k / 50, "clip_high": 0.2 + k / 50},
        "reinforce": lambda k: {},
    }[variant]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(grpo_loss, fullgraph=True, backend=counter, dynamic=dynamic)
    for k in range(3):
        batch = batch_of(seed=k, num_sequences=4 + k, num_tokens=7 + 2 * k, dtype=torch.float32)
        changes = {
            "kl_coef": 0.1 + k / 11,
            "entropy_coef": 0.2 + k / 13,
            "num_sequences": 9.5 + k,
            **numbers(k),
        }
        arguments, keywords = everything(batch, variant, **changes)
        torch.testing.assert_close(
            compiled(*arguments, **keywords).loss, grpo_loss(*arguments, **keywords).loss
        )
    assert counter.frame_count == (1 if dynamic else 2)


def test_the_helpers_are_one_graph(batch_of):
    batch = batch_of(seed=32)
    ids = torch.tensor([4, 4, 9, 9, 4])

    def prepare(rewards, logp):
        advantages = group_advantages(rewards, group_ids=ids)
        return (
            advantages,
            importance_weights(
                batch.old_logp, batch.sampler_logp, batch.mask, mode="sequence_mask", high=2.0
            ),
            off_policy_mask(logp, batch.sampler_logp, advantages, batch.mask, 0.01),
            top_entropy_mask(batch.entropy, batch.mask, 0.3),
            reduction_weights(batch.mask, "token", num_tokens=torch.tensor(70)),
        )

    rewards = torch.tensor([1.0, 0.0, 2.0, 2.5, 0.5])
    compiled = torch.compile(prepare, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(rewards, batch.logp), prepare(rewards, batch.logp), strict=True):
        torch.testing.assert_close(one, other)


def test_linear_grpo_loss_is_one_graph():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    arguments = (hidden, weight, targets, None, torch.tensor([1.0, -0.5]), mask)
    compiled = torch.compile(linear_grpo_loss, fullgraph=True, backend="aot_eager")
    output, expected = compiled(*arguments, entropy=True), linear_grpo_loss(*arguments, entropy=True)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.metrics.tensor, expected.metrics.tensor)
    leaves = (hidden, weight)
    for one, other in zip(
        torch.autograd.grad(output.loss, leaves), torch.autograd.grad(expected.loss, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Values may not be looked at, as for CUDA tensors."""
    monkeypatch.setattr("r1kernels.checks.values_visible", lambda *tensors: False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_read_on_the_host(batch_of, variant, packed, as_on_a_gpu):
    batch = batch_of(seed=33, dtype=torch.float32)
    arguments, keywords = everything(batch, variant, packed, num_sequences=torch.tensor(7))
    with NoHostReads():
        output = grpo_loss(*arguments, **keywords)
        output.loss.backward()
        assert set(output.metrics) >= {"loss", "kl", "entropy"}


def test_the_helpers_read_nothing_on_the_host(batch_of, as_on_a_gpu):
    batch = batch_of(seed=34)
    with NoHostReads():
        for groups in ({"group_size": 5}, {"group_ids": torch.tensor([3, 1, 3, 1, 3])}):
            group_advantages(batch.advantages, valid=torch.tensor([True, True, False, True, True]), **groups)
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
            importance_weights(batch.old_logp, batch.sampler_logp, batch.mask, mode=mode, low=0.5, high=2.0)
        off_policy_mask(batch.logp, batch.sampler_logp, batch.advantages, batch.mask, 0.1)
        top_entropy_mask(batch.entropy, batch.mask, 0.2)
        for reduction in ("sequence", "token", "constant", "sequence-sum"):
            reduction_weights(batch.mask, reduction)


def test_the_guard_against_host_reads_sees_them():
    with pytest.raises(AssertionError, match="reads a value on the host"), NoHostReads():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="depends on values"), NoHostReads():
        torch.ones(3)[torch.tensor([True, False, True])]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_fake_tensors_go_through_and_leave_nothing_behind(batch_of, backend):
    """What is kept from call to call must not be made of them."""
    batch = batch_of(seed=35, dtype=torch.float32)
    arguments, keywords = everything(batch, "grpo", clip_low=0.123, backend=backend)

    def run(logp, others, keywords):
        output = grpo_loss(logp, *others, **keywords)
        return output.loss, torch.autograd.grad(output.loss, logp)[0]

    fake = FakeTensorMode(allow_non_fake_inputs=False)

    def faked(value):
        return fake.from_tensor(value) if isinstance(value, torch.Tensor) else value

    with fake:
        logp, *others = map(faked, arguments)
        loss, grad = run(logp, others, {name: faked(value) for name, value in keywords.items()})
        assert loss.shape == () and grad.shape == batch.logp.shape
        assert group_advantages(fake.from_tensor(batch.advantages), group_size=5, backend=backend).shape == (
            5,
        )
    loss, grad = run(arguments[0], arguments[1:], keywords)
    assert loss.isfinite() and grad.isfinite().all()
