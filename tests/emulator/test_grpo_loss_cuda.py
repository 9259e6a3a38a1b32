"""The CUDA kernels of grpo_loss and group_advantages, their real source and launchers, under the host emulator.

The emulated launchers stand behind the ops of the backend "cuda" for CPU tensors, so that the Python of that backend
runs too.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels.grpo import group_advantages
from r1kernels.grpo.loss import FORWARD, shapes
from r1kernels.grpo.objective import Numbers
from tests.support.forced import public_on
from tests.support.grpo_loss_kernel import GrpoLossKernel, gradients, on_backend, random_call
from tests.support.numerics import same_bits


def address(tensor):
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


class EmulatedOps:
    def __init__(self, module):
        self.module = module

    def layout(self, mask, cu_seqlens):
        packed = cu_seqlens is not None
        return {
            "sequences": cu_seqlens.numel() - 1 if packed else mask.shape[0],
            "width": 0 if packed else mask.shape[1],
            "tokens": mask.numel(),
            "mask": address(mask),
            "mask_bytes": mask.element_size(),
            "cu_seqlens": address(cu_seqlens),
            "cu_seqlens_bytes": cu_seqlens.element_size() if packed else 0,
        }

    def forward(self, *row):
        call = FORWARD.fields.back(row)
        given, outputs = call.tokens, shapes(call)
        for output in outputs:
            output.fill_(torch.nan)
        fields = self.layout(given.mask, given.cu_seqlens)
        one_each = (fields["sequences"], 1)
        tensors = given._asdict() | {"total": call.total, "numbers": call.numbers} | outputs._asdict()
        fields |= {name: address(tensor) for name, tensor in tensors.items()}
        fields |= {"variant": call.variant, "ratio": call.ratio, "kl": call.kl, "count": call.counted}
        fields["advantages_per_token"] = given.advantages.shape != one_each
        policy_weights = given.policy_weights
        fields["policy_weights_per_token"] = policy_weights is not None and policy_weights.shape != one_each
        workspace = torch.full((self.module.workspace_bytes(fields),), 255, dtype=torch.uint8)
        assert self.module.forward(fields | {"workspace": workspace.data_ptr()}) == 0
        return outputs

    def backward(self, grad_loss, grad_logp, grad_of_ratio, grad_entropy, mask, cu_seqlens, logp):
        results = torch.full_like(grad_logp, torch.nan), torch.full_like(grad_entropy, torch.nan)
        absent = (
            "old_logp ref_logp advantages policy_weights entropy entropy_weights weights total loss metrics "
            "advantages_per_token policy_weights_per_token variant ratio kl count"
        )
        fields = self.layout(mask, cu_seqlens) | dict.fromkeys(absent.split(), 0)
        numbers = torch.zeros(len(Numbers._fields))
        fields |= {
            "numbers": address(numbers),
            "logp": address(logp),
            "grad_logp": address(grad_logp),
            "grad_of_ratio": address(grad_of_ratio),
            "grad_entropy": address(grad_entropy),
        }
        assert self.module.backward(fields, grad_loss.data_ptr(), *map(address, results)) == 0
        return results

    def advantages(self, rewards, group_size, group_ids, valid, scale, eps, leave_one_out):
        result = torch.full_like(rewards, torch.nan)
        fields = {"size": rewards.numel(), "group_size": group_size, "scale": scale, "eps": float(eps)}
        fields |= {"leave_one_out": leave_one_out, "advantages": address(result), "rewards": address(rewards)}
        fields |= {"group_ids": address(group_ids), "valid": address(valid)}
        assert self.module.advantages(fields) == 0
        return result


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("grpo_loss")


@pytest.fixture
def backend(module):
    library = torch.library.Library("r1kernels", "IMPL")
    emulated_ops = EmulatedOps(module)
    module.set_seed(0)
    library.impl("grpo_loss_cuda", emulated_ops.forward, "CPU")
    library.impl("grpo_loss_cuda_backward", emulated_ops.backward, "CPU")
    library.impl("group_advantages_cuda", emulated_ops.advantages, "CPU")
    yield "cuda"
    library._destroy()


class TestGrpoLossCuda(GrpoLossKernel):
    pass


def results_on(module, stream, changes):
    """Metrics and gradients of a call on a stream, a number; its launches and memsets."""
    arguments, keywords = random_call(1, 3, 2100)
    module.set_stream(stream)
    module.launches_and_memsets()
    output, grads = gradients(
        lambda *v, **o: on_backend("cuda", *v, **o), arguments, keywords | changes, upstream=0.5
    )
    module.set_stream(0)
    return (output.metrics.tensor, *grads), module.launches_and_memsets()


def assert_same(results, others):
    assert all(same_bits(one, other) for one, other in zip(results, others, strict=True))


WITHOUT_SUMS = {"reduction": "token", "num_tokens": 99.0}


@pytest.mark.parametrize(
    ("changes", "launches"), [({}, 2), ({"ratio": "sequence"}, 2), (WITHOUT_SUMS, 1), ({"weights": 1.0}, 1)]
)
def test_a_loss_is_one_launch_and_another_before_it_for_sums(module, backend, changes, launches):
    """The counter of blocks takes none: the last block sets it back."""
    if "weights" in changes:
        changes = {"weights": torch.full((3, 2100), 1.0)}
    first, _ = results_on(module, 0, changes)
    for _ in range(2):
        results, asked = results_on(module, 0, changes)
        assert asked == (launches + 1, 0)  # and the backward
        assert_same(results, first)


def test_streams_count_their_blocks_apart(module, backend):
    alone, _ = results_on(module, 1, WITHOUT_SUMS)
    counters = module.counters()
    counters[module.counter_of(1)] = 2  # blocks have finished of a kernel that runs there
    others, _ = results_on(module, 2, WITHOUT_SUMS)
    assert counters[module.counter_of(1)] == 2
    counters[module.counter_of(1)] = 0
    assert_same(others, alone)


def test_a_graph_counts_in_memory_of_its_own(module, backend):
    """It may run at the same time as what the stream that captured it does by then."""
    eager, _ = results_on(module, 1, WITHOUT_SUMS)
    counters = module.counters()
    counters[module.counter_of(1)] = 2
    module.set_capture(True)
    captured, asked = results_on(module, 1, WITHOUT_SUMS)
    module.set_capture(False)
    assert asked == (2, 1) and counters[module.counter_of(1)] == 2
    counters[module.counter_of(1)] = 0
    assert_same(captured, eager)


def test_streams_without_a_counter_are_served(module, backend):
    expected, _ = results_on(module, 0, WITHOUT_SUMS)
    numbers = [module.counter_of(stream) for stream in range(200)]
    assert numbers == [module.counter_of(stream) for stream in range(200)]
    having = [number for number in numbers if number >= 0]
    assert sorted(having) == list(range(len(module.counters())))
    results, asked = results_on(module, 199, WITHOUT_SUMS)
    assert numbers[199] < 0 and asked == (2, 1)
    assert_same(results, expected)


@pytest.mark.parametrize("ratio", ["token", "output"])
def test_no_order_of_threads_or_blocks_moves_a_bit(module, backend, ratio):
    """A missing barrier or fence between the blocks shows as a difference between two orders."""
    arguments, keywords = random_call(1, 3, 2100)
    results = []
    for seed in range(4):
        module.set_seed(seed)
        results.append(
            gradients(lambda *v, **o: on_backend(backend, *v, **o), arguments, keywords | {"ratio": ratio})
        )
    for output, grads in results[1:]:
        assert same_bits(output.metrics.tensor, results[0][0].metrics.tensor)
        assert all(same_bits(one, other) for one, other in zip(grads, results[0][1], strict=True))


def test_wrong_boundaries_read_and_write_nothing_outside(backend, monkeypatch):
    """On a GPU no one looks at the boundaries: tokens behind the last one count nowhere and get no gradient."""
    monkeypatch.setattr("r1kernels.checks.values_visible", lambda *tensors: False)
    (logp, old, advantages, mask), keywords = random_call(2, packed=True)
    keywords["cu_seqlens"] = torch.tensor([0, 9, 4, 20, 5000])
    output, grads = gradients(
        lambda *v, **o: on_backend(backend, *v, **o), (logp, old, advantages, mask), keywords
    )
    assert torch.isfinite(output.loss)
    keywords["cu_seqlens"] = torch.tensor([0, 9, 12, 20, 30])
    _, grads = gradients(
        lambda *v, **o: on_backend(backend, *v, **o), (logp, old, advantages, mask), keywords
    )
    assert not grads[0][30:].any() and grads[0][:30].any()


def test_tokens_before_the_first_boundary_count_nowhere(backend, monkeypatch):
    monkeypatch.setattr("r1kernels.checks.values_visible", lambda *tensors: False)
    logp = -torch.rand(5000, generator=torch.Generator().manual_seed(16))
    mask = torch.ones(5000, dtype=torch.bool)
    keywords = {"cu_seqlens": torch.tensor([3000, 4100, 5000])}
    output, grads = gradients(
        lambda *v, **o: on_backend(backend, *v, **o), (logp, logp, torch.ones(2), mask), keywords
    )
    assert output.metrics["num_tokens"] == 2000
    assert not grads[0][:3000].any() and grads[0][3000:].all()


@pytest.mark.parametrize(
    ("scale", "leave_one_out"), [("group", False), ("batch", False), ("none", False), ("group", True)]
)
def test_group_advantages(backend, scale, leave_one_out):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(150, generator=generator).round()  # some groups are equal
    for groups in ({"group_size": 6}, {"group_ids": torch.randint(-3, 30, (150,), generator=generator)}):
        for valid in (None, torch.rand(150, generator=generator) > 0.3):
            keywords = {"group_size": None, "group_ids": None, **groups, "valid": valid, "scale": scale}
            keywords |= {"leave_one_out": leave_one_out, "eps": 1e-4}
            ours = public_on(backend, group_advantages, rewards, **keywords)
            torch.testing.assert_close(ours, group_advantages(rewards, **keywords, backend="reference"))
