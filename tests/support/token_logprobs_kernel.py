"""What every kernel of token_logprobs must do, whatever runs it: the host emulator, Triton's interpreter, a GPU.

A test class inherits from ``TokenLogprobsKernel`` and has a fixture ``kernel`` with

    device
    forward_into(logits, targets, temperatures, temperature, ignore_index, logp, entropy or None, stats)
    backward_into(grad_logits, logits, targets, temperatures, temperature, ignore_index, logp, stats, grad_logp, grad_entropy)

Tensors lie in redzones. B, T leading dimensions, V vocabulary, N = B * T rows.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from r1kernels.logprob import reference
from r1kernels.logprob.token import RowsBackwardCall, RowsCall, Upstream, plain_rows
from tests.support import logprob_oracle as oracle
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.redzones import Redzones

IGNORED = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "token slice": lambda b, t, v: ((b, t + 1, v), lambda buffer: buffer[:, :-1]),
    "vocabulary slice": lambda b, t, v: ((b, t, v + 5), lambda buffer: buffer[..., 3:-2]),
    "transposed": lambda b, t, v: ((t, b, v), lambda buffer: buffer.transpose(0, 1)),
    "every second token": lambda b, t, v: ((b, 2 * t, v), lambda buffer: buffer[:, ::2]),
}


class Call:
    """One forward and backward on fenced copies of the arguments; NaN stands in every output beforehand.

    logp, entropy, stats and grad are the results, on the CPU.
    """

    def __init__(
        self,
        kernel,
        logits: Tensor,
        targets: Tensor,
        temperature: float | Tensor = 1.0,
        *,
        entropy: bool = True,
        grads: tuple[Tensor | None, Tensor | None] | None = None,
        layout: str | None = None,
        offset: int = 0,
        inplace: bool = False,
    ) -> None:
        zones = Redzones(kernel.device)
        rows = targets.numel()
        shape, view = LAYOUTS[layout](*logits.shape) if layout else (None, lambda buffer: buffer)
        z = zones.input(logits, view, shape, offset, writable=inplace)
        temperatures = zones.input(temperature) if isinstance(temperature, Tensor) else None
        scalar = 1.0 if isinstance(temperature, Tensor) else temperature
        arguments = (zones.input(targets), temperatures, scalar, IGNORED)
        logp, stats = zones.output(rows), zones.output(3, rows)
        value = zones.output(rows) if entropy else None
        kernel.forward_into(z, *arguments, logp, value, stats)
        if grads is not None:
            upstream = [None if grad is None else zones.input(grad) for grad in grads]
            grad = z if inplace else zones.output(*logits.shape, dtype=logits.dtype)
            kernel.backward_into(grad, z, *arguments, logp, stats, *upstream)
            self.grad = grad.cpu()
        zones.check()
        self.logp, self.stats = logp.cpu(), stats.cpu()
        self.entropy = value.cpu() if value is not None else None


def random_case(
    batch: int, tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32, scale: float = 4.0
):
    """(logits, targets, grad_logp, grad_entropy)"""
    generator = torch.Generator().manual_seed(vocabulary + 1000 * tokens)
    logits = (scale * torch.randn(batch, tokens, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (batch * tokens,), generator=generator)
    return logits, targets, *torch.randn(2, batch * tokens, generator=generator)


def exact(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, grad_logp: Tensor, grad_entropy: Tensor
):
    """(logp, entropy, gradient) in float64."""
    temperatures, scalar = (
        (temperature.double(), 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    )
    logits = logits.double()
    rows = plain_rows(logits, targets, temperatures, scalar, IGNORED)
    logp, entropy, stats = reference.forward(RowsCall(logits, rows, True, False))
    upstream = Upstream(logp, stats, grad_logp.double(), grad_entropy.double(), None)
    return logp, entropy, reference.backward(RowsBackwardCall(logits, rows, upstream))


def eager(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, grad_logp: Tensor, grad_entropy: Tensor
):
    """(logp, entropy, gradient) as people write it, the softmax in float32."""
    z = logits.detach().clone().requires_grad_()
    divisor = temperature.view(*logits.shape[:2], 1) if isinstance(temperature, Tensor) else temperature
    log_probs = torch.log_softmax((z.float() / divisor).flatten(0, 1), dim=-1)
    logp = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    (gradient,) = torch.autograd.grad((logp * grad_logp + entropy * grad_entropy).sum(), z)
    return logp.detach(), entropy.detach(), gradient


class TokenLogprobsKernel:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (2, 3, 17), (1, 2, 1000), (2, 2, 2049)], ids=str)
    def test_as_exact_as_eager(self, kernel, shape, dtype):
        logits, targets, *grads = random_case(*shape, dtype)
        self.assert_exact(kernel, logits, targets, 0.7, grads)

    def test_one_temperature_per_row(self, kernel):
        logits, targets, *grads = random_case(2, 3, 33)
        temperature = torch.tensor([0.1, 0.5, 1.0, 1.7, 3.0, 10.0])
        self.assert_exact(kernel, logits, targets, temperature, grads)

    @pytest.mark.parametrize("scale", [30.0, 1e4], ids=str)
    def test_wide_logits(self, kernel, scale):
        logits, targets, *grads = random_case(1, 4, 300, scale=scale)
        targets[:2] = logits[0, :2].argmax(-1)
        self.assert_exact(kernel, logits, targets, 1.0, grads)

    @pytest.mark.parametrize("lead", [0.0, 10.0, 20.0, 40.0, 75.0])
    def test_nothing_cancels_where_one_logit_leads(self, kernel, lead):
        """The textbook forms lose the entropy from 20 nats on, and the gradient of a leading target from 17 on."""
        logits, _, grad_logp, grad_entropy = random_case(1, 2, 200, scale=1.0)
        logits[0, :, 123] = logits.amax() + lead
        targets = torch.tensor([123, 7])
        call = Call(kernel, logits, targets, grads=(grad_logp, grad_entropy))
        logp, entropy = oracle.rows(logits[0], targets)
        gradient = oracle.gradients(logits[0], targets, grad_logp, grad_entropy)
        torch.testing.assert_close(call.logp.double(), logp, rtol=2e-5, atol=0)
        torch.testing.assert_close(call.entropy.double(), entropy, rtol=2e-5, atol=0)
        difference, scale = (call.grad[0].double() - gradient).abs(), gradient.abs().amax(-1, keepdim=True)
        assert (difference <= 2e-5 * gradient.abs() + 1e-6 * scale).all(), difference.max()
        assert (call.logp <= 0).all() and (call.entropy >= 0).all()

    def test_masked_vocabulary(self, kernel):
        """-inf logits have probability 0, also where they fill the first blocks of a row or all but one place."""
        logits, targets, *grads = random_case(1, 4, 3000)
        logits[0, 0, :2500], targets[0] = -math.inf, 2600
        logits[0, 1, 5:], targets[1] = -math.inf, 3
        logits[0, 2, 1::2], targets[2] = -math.inf, 1000
        logits[0, 3, :], logits[0, 3, 1234], targets[3] = -math.inf, 5.0, 1234
        call = Call(kernel, logits, targets, grads=grads)
        logp, entropy, gradient = exact(logits, targets, 1.0, *grads)
        torch.testing.assert_close(call.logp.double(), logp, rtol=1e-6, atol=0)
        torch.testing.assert_close(call.entropy.double(), entropy, rtol=1e-6, atol=0)
        torch.testing.assert_close(call.grad.double(), gradient, rtol=1e-5, atol=1e-7)
        assert (call.grad[logits == -math.inf] == 0).all()
        assert call.logp[3] == 0 and call.entropy[3] == 0

    def test_masked_target(self, kernel):
        logits, targets, *grads = random_case(1, 2, 50)
        logits[0, 0, targets[0]] = -math.inf
        call = Call(kernel, logits, targets, grads=grads)
        _, entropy, gradient = exact(logits, targets, 1.0, *grads)
        assert call.logp[0] == -math.inf
        torch.testing.assert_close(call.entropy.double(), entropy, rtol=1e-6, atol=0)
        torch.testing.assert_close(call.grad.double(), gradient, rtol=1e-5, atol=1e-7)
        assert same_bits(call.logp[1:], Call(kernel, logits[:, 1:], targets[1:]).logp)

    def test_a_bad_row_is_nan_alone(self, kernel):
        logits, targets, *grads = random_case(1, 6, 1500)
        clean = Call(kernel, logits, targets, grads=grads)
        logits[0, 0] = -math.inf
        logits[0, 1, 777] = math.nan
        logits[0, 2, 1499] = math.inf
        logits[0, 3, 0], logits[0, 3, 1:] = math.nan, -math.inf
        call = Call(kernel, logits, targets, grads=grads)
        for name in ("logp", "entropy"):
            assert getattr(call, name)[:4].isnan().all()
            assert same_bits(getattr(call, name)[4:], getattr(clean, name)[4:])
        assert call.grad[0, :4].isnan().all()
        assert same_bits(call.grad[0, 4:], clean.grad[0, 4:])

    @pytest.mark.parametrize("which", [0, 1], ids=["logp", "entropy"])
    def test_a_bad_row_is_nan_under_one_gradient(self, kernel, which):
        logits, targets, *grads = random_case(1, 2, 40)
        logits[0, 0, 3] = math.nan
        grads[1 - which] = None
        call = Call(kernel, logits, targets, grads=grads)
        assert call.grad[0, 0].isnan().all() and call.grad[0, 1].isfinite().all()

    def test_ignored_rows_are_zero_whatever_they_hold(self, kernel):
        logits, targets, *grads = random_case(2, 2, 70)
        targets[0] = targets[3] = IGNORED
        logits[1, 1] = math.nan
        call = Call(kernel, logits, targets, grads=grads)
        ignored = targets == IGNORED
        assert (call.logp[ignored] == 0).all() and (call.entropy[ignored] == 0).all()
        assert (call.grad.flatten(0, 1)[ignored] == 0).all()
        logp, entropy, gradient = exact(logits, targets, 1.0, *grads)
        torch.testing.assert_close(call.logp.double(), logp, rtol=1e-6, atol=0)
        torch.testing.assert_close(call.entropy.double(), entropy, rtol=1e-6, atol=0)
        torch.testing.assert_close(call.grad.double(), gradient, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("bad", [-1, 20, 21, -(2**40), 2**40, 2**63 - 1])
    def test_a_target_out_of_range_is_nan(self, kernel, bad):
        logits, targets, *grads = random_case(1, 3, 20)
        clean = Call(kernel, logits, targets, grads=grads)
        targets[1] = bad
        call = Call(kernel, logits, targets, grads=grads)
        assert call.logp[1].isnan() and call.entropy[1].isnan() and call.grad[0, 1].isnan().all()
        for row in (0, 2):
            assert same_bits(call.logp[row], clean.logp[row])
            assert same_bits(call.grad[0, row], clean.grad[0, row])

    @pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
    def test_a_temperature_that_is_not_above_0_is_nan(self, kernel, bad):
        logits, targets, *grads = random_case(1, 2, 20)
        call = Call(kernel, logits, targets, torch.tensor([bad, 0.5]), grads=grads)
        good = Call(kernel, logits, targets, torch.tensor([0.5, 0.5]), grads=grads)
        assert call.logp[0].isnan() and call.entropy[0].isnan() and call.grad[0, 0].isnan().all()
        assert same_bits(call.logp[1], good.logp[1]) and same_bits(call.grad[0, 1], good.grad[0, 1])

    def test_the_largest_numbers_of_float32(self, kernel):
        """Differences overflow to inf, which is a probability of 0."""
        logits = torch.tensor([[[3.4e38, -3.4e38, 0.0], [-3.4e38, -3.4e38, -3.4e38]]])
        call = Call(kernel, logits, torch.tensor([0, 1]), grads=(torch.ones(2), torch.ones(2)))
        torch.testing.assert_close(call.logp, torch.tensor([0.0, -math.log(3)]))
        torch.testing.assert_close(call.entropy, torch.tensor([0.0, math.log(3)]))
        torch.testing.assert_close(call.grad[0, 0], torch.zeros(3))
        torch.testing.assert_close(call.grad[0, 1], torch.tensor([-1 / 3, 2 / 3, -1 / 3]))

    @pytest.mark.parametrize("grads", ["logp", "entropy"])
    def test_one_gradient_alone(self, kernel, grads):
        logits, targets, grad_logp, grad_entropy = random_case(2, 2, 129)
        zero = torch.zeros(4)
        given, full = (
            ((grad_logp, None), (grad_logp, zero))
            if grads == "logp"
            else ((None, grad_entropy), (zero, grad_entropy))
        )
        _, _, gradient = exact(logits, targets, 1.0, *full)
        call = Call(kernel, logits, targets, grads=given)
        torch.testing.assert_close(call.grad.double(), gradient, rtol=1e-5, atol=1e-7)

    def test_without_entropy_the_log_prob_keeps_its_bits(self, kernel):
        logits, targets, grad_logp, _ = random_case(2, 2, 1025)
        both = Call(kernel, logits, targets, grads=(grad_logp, None))
        alone = Call(kernel, logits, targets, entropy=False, grads=(grad_logp, None))
        assert same_bits(both.logp, alone.logp) and same_bits(both.grad, alone.grad)
        assert (alone.stats[2] == 0).all()

    @pytest.mark.parametrize("vocabulary", [64, 67])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_any_layout_gives_the_same_bits(self, kernel, layout, dtype, vocabulary):
        logits, targets, *grads = random_case(2, 3, vocabulary, dtype)
        plain = Call(kernel, logits, targets, 0.9, grads=grads)
        strided = Call(kernel, logits, targets, 0.9, grads=grads, layout=layout)
        for name in ("logp", "entropy", "grad"):
            assert same_bits(getattr(plain, name), getattr(strided, name)), name

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("offset", [1, 2, 4])
    def test_a_row_keeps_its_bits_wherever_it_lies(self, kernel, offset, dtype):
        """Neither the address, nor the place in the batch, nor the other rows move a bit."""
        for vocabulary in (1032, 1027):
            logits, targets, *_ = random_case(1, 4, vocabulary, dtype)
            together = Call(kernel, logits, targets)
            for row in range(4):
                alone = Call(kernel, logits[:, row : row + 1], targets[row : row + 1], offset=offset)
                assert same_bits(together.logp[row : row + 1], alone.logp)
                assert same_bits(together.entropy[row : row + 1], alone.entropy)

    def test_expanded_logits(self, kernel):
        logits, targets, *grads = random_case(1, 2, 40)
        targets, grads = targets.repeat(3), [grad.repeat(3) for grad in grads]
        repeated = Call(kernel, logits.repeat(3, 1, 1), targets, grads=grads)

        expanded, targets, *grads = (tensor.to(kernel.device) for tensor in (logits, targets, *grads))
        expanded = expanded.expand(3, 2, 40)
        logp, entropy, stats = (
            torch.full(shape, torch.nan, device=kernel.device) for shape in [(6,), (6,), (3, 6)]
        )
        grad = torch.full((3, 2, 40), torch.nan, device=kernel.device)
        kernel.forward_into(expanded, targets, None, 1.0, IGNORED, logp, entropy, stats)
        kernel.backward_into(grad, expanded, targets, None, 1.0, IGNORED, logp, stats, *grads)
        assert same_bits(logp.cpu(), repeated.logp) and same_bits(grad.cpu(), repeated.grad)

    @pytest.mark.parametrize("layout", [None, *LAYOUTS])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_gradient_over_the_logits(self, kernel, dtype, layout):
        logits, targets, *grads = random_case(2, 3, 67, dtype)
        targets[1] = IGNORED
        apart = Call(kernel, logits, targets, grads=grads)
        over = Call(kernel, logits, targets, grads=grads, layout=layout, inplace=True)
        assert same_bits(apart.grad, over.grad)

    @pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8)], ids=str)
    def test_no_rows(self, kernel, shape):
        logits, targets, *grads = random_case(*shape)
        call = Call(kernel, logits, targets, grads=grads)
        assert call.logp.shape == (0,) and call.grad.shape == shape

    def test_twice_the_same_bits(self, kernel):
        logits, targets, *grads = random_case(2, 2, 2500, torch.bfloat16)
        first, second = (Call(kernel, logits, targets, 1.3, grads=grads) for _ in range(2))
        for name in ("logp", "entropy", "stats", "grad"):
            assert same_bits(getattr(first, name), getattr(second, name)), name

    def assert_exact(self, kernel, logits, targets, temperature, grads):
        call = Call(kernel, logits, targets, temperature, grads=grads)
        results = (call.logp, call.entropy, call.grad)
        peers = eager(logits, targets, temperature, *grads)
        truths = exact(logits, targets, temperature, *grads)
        for ours, peer, truth in zip(results, peers, truths, strict=True):
            assert_as_exact_as(ours, peer, truth, ours.dtype)
