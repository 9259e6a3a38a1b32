"""The cpu backend of grpo_loss and group_advantages: csrc/grpo."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from r1kernels import extension, use_backend
from r1kernels.backends import BackendError
from r1kernels.grpo import group_advantages, grpo_loss
from tests.support.grpo_loss_kernel import GrpoLossKernel, gradients, on_backend, random_call
from tests.support.numerics import same_bits

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


@pytest.fixture
def backend():
    return "cpu"


class TestGrpoLossOnCpu(GrpoLossKernel):
    long = 9001


def test_the_number_of_threads_moves_no_bit():
    arguments, keywords = random_call(1, 30, 3000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gradients(lambda *v, **o: on_backend("cpu", *v, **o), arguments, keywords))
    finally:
        torch.set_num_threads(threads)
    for output, grads in results[1:]:
        assert same_bits(output.metrics.tensor, results[0][0].metrics.tensor)
        assert all(same_bits(one, other) for one, other in zip(grads, results[0][1], strict=True))


def test_the_automatic_choice_on_the_cpu():
    arguments, keywords = random_call(2)
    with use_backend("cpu", op="grpo_loss"):
        expected = grpo_loss(*arguments, **keywords)
    assert same_bits(grpo_loss(*arguments, **keywords).metrics.tensor, expected.metrics.tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_log_probs_are_those_of_float32_and_get_their_gradient_in_their_dtype(dtype):
    (logp, old, advantages, mask), keywords = random_call(3)
    narrow = (logp.to(dtype), old.to(dtype), advantages, mask)
    output, (grad, _) = gradients(lambda *v, **o: on_backend("cpu", *v, **o), narrow, keywords)
    wide, (wide_grad, _) = gradients(
        lambda *v, **o: on_backend("cpu", *v, **o),
        (narrow[0].float(), narrow[1].float(), *narrow[2:]),
        keywords,
    )
    assert grad.dtype == dtype and same_bits(grad, wide_grad.to(dtype))
    assert same_bits(output.metrics.tensor, wide.metrics.tensor)


def test_float64_is_left_to_the_reference():
    arguments, _ = random_call(4)
    with pytest.raises(BackendError, match="float64 is served by the reference alone"):
        grpo_loss(arguments[0].double(), *arguments[1:], backend="cpu")


def test_strides_change_nothing():
    (logp, old, advantages, mask), keywords = random_call(5)
    strided = [value.t().contiguous().t() for value in (logp, old, mask)]
    one = on_backend("cpu", logp, old, advantages, mask, **keywords)
    other = on_backend("cpu", strided[0], strided[1], advantages, strided[2], **keywords)
    assert same_bits(one.metrics.tensor, other.metrics.tensor)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_opcheck(ratio):
    (logp, old, advantages, mask), keywords = random_call(7, packed=True)
    seen = []
    op = torch.ops.r1kernels.grpo_loss_cpu.default
    backward = torch.ops.r1kernels.grpo_loss_cpu_backward.default

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (op, backward):
                seen.append((function, args))
            return function(*args, **(kwargs or {}))

    with Recorder():
        gradients(
            lambda *v, **o: on_backend("cpu", *v, **o),
            (logp, old, advantages, mask),
            keywords | {"ratio": ratio},
        )
    assert [function for function, _ in seen] == [op, backward]
    for function, args in seen:
        # what does not count holds NaN, which opcheck would take for a difference
        torch.library.opcheck(
            function, tuple(a.detach().nan_to_num() if torch.is_tensor(a) else a for a in args)
        )


@pytest.mark.slow
def test_compiled_it_is_one_graph_and_no_number_recompiles_it():
    """With the compiler that fixes every number it can: an op with a float argument would be compiled again for each."""
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(grpo_loss, fullgraph=True, backend=counter)
    for k in range(4):
        (logp, old, advantages, mask), keywords = random_call(20 + k, 3 + k, 20 + 3 * k)
        keywords |= {
            "clip_high": 0.2 + k / 50,
            "delta": 2 + k / 9,
            "kl_coef": 0.1 + k / 11,
            "num_sequences": 5.5 + k,
        }
        arguments = (logp.nan_to_num(0, 0, 0).requires_grad_(), old, advantages, mask)
        output, expected = compiled(*arguments, **keywords), grpo_loss(*arguments, **keywords)
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, arguments[0])[0] for loss in (output.loss, expected.loss))
        )
    assert counter.frame_count <= 2


def test_a_second_derivative_is_refused():
    arguments, _ = random_call(8)
    logp = arguments[0].nan_to_num(0, 0, 0).requires_grad_()
    (grad,) = torch.autograd.grad(
        grpo_loss(logp, *arguments[1:], backend="cpu").loss, logp, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_the_op_checks_the_boundaries_that_a_compiled_graph_does_not(monkeypatch):
    monkeypatch.setattr("r1kernels.checks.values_visible", lambda *tensors: False)
    (logp, old, advantages, mask), keywords = random_call(9, packed=True)
    keywords["cu_seqlens"] = keywords["cu_seqlens"] + 1
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        on_backend("cpu", logp, old, advantages, mask, **keywords)


SCALES = [("group", False), ("batch", False), ("none", False), ("group", True)]


@pytest.mark.parametrize(("scale", "leave_one_out"), SCALES)
def test_group_advantages(scale, leave_one_out):
    generator = torch.Generator().manual_seed(0)
    for size, by_ids, with_valid in itertools.product((0, 1, 42), (False, True), (False, True)):
        rewards = torch.randn(size, generator=generator).round()  # some groups are equal
        groups = (
            {"group_ids": torch.randint(-3, 9, (size,), generator=generator)}
            if by_ids
            else {"group_size": 1 if size == 1 else 6}
        )
        valid = torch.rand(size, generator=generator) > 0.3 if with_valid else None
        keywords = {**groups, "valid": valid, "scale": scale, "leave_one_out": leave_one_out}
        ours = group_advantages(rewards, **keywords, backend="cpu")
        torch.testing.assert_close(ours, group_advantages(rewards, **keywords, backend="reference"))


def test_group_advantages_of_other_dtypes():
    rewards = torch.tensor([True, False, False, True])
    assert same_bits(
        group_advantages(rewards, group_size=4, backend="cpu"),
        group_advantages(rewards.float(), group_size=4, backend="cpu"),
    )
    with pytest.raises(BackendError, match="int64 is served by the reference alone"):
        group_advantages(rewards.long(), group_size=4, backend="cpu")
