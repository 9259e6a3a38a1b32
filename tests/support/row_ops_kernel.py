"""What every kernel of the row ops must do beyond plain token_logprobs (token_logprobs_kernel.py), whatever runs it:
bias, logit_scale, softcap, slabs of a vocabulary, extra statistics, gradients by sequence, long rows.

A test class inherits from ``RowOpsKernel`` and has a fixture ``kernel`` with

    device
    rows_forward_into(logits, rows: Rows, with_entropy, logp, entropy or None, stats, extra or None)
    rows_backward_into(grad_logits, logits, rows, logp, stats, grad_logp, grad_entropy, sequences)

and a fixture ``long_row``: a vocabulary that the kernel sums up in several pieces. Tensors lie in redzones. B, T leading
dimensions, V vocabulary, N = B * T rows.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from r1kernels.logprob import reference
from r1kernels.logprob.token import Rows, RowsBackwardCall, RowsCall, Upstream
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.redzones import Redzones
from tests.support.token_logprobs_kernel import DTYPES, IGNORED, LAYOUTS, random_case

TRANSFORMS = {
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "logit_scale": -1.5, "softcap": 7.0},
}


def rows_of(logits: Tensor, targets: Tensor, **given) -> Rows:
    """``Rows`` of whole plain rows, but for what is given."""
    plain = Rows(None, 1.0, 0.0, targets, None, 1.0, IGNORED, 0, logits.shape[-1])
    return plain._replace(**given)


def transform_of(name: str, vocabulary: int) -> dict:
    """The fields of ``Rows`` that a name of TRANSFORMS stands for."""
    given = dict(TRANSFORMS[name])
    if given.pop("bias", False):
        given["bias"] = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    return given


class RowCall:
    """One forward and backward of the row ops on fenced copies of the arguments, like ``token_logprobs_kernel.Call``."""

    def __init__(
        self,
        kernel,
        logits: Tensor,
        rows: Rows,
        *,
        entropy: bool = True,
        extra: bool = False,
        grads: tuple[Tensor | None, Tensor | None] | None = None,
        sequences: Tensor | None = None,
        saved: tuple[Tensor, Tensor] | None = None,
        layout: str | None = None,
        inplace: bool = False,
    ) -> None:
        zones = Redzones(kernel.device)
        count = rows.targets.numel()
        shape, view = LAYOUTS[layout](*logits.shape) if layout else (None, lambda buffer: buffer)
        z = zones.input(logits, view, shape, writable=inplace)
        fenced = {
            name: zones.input(value) for name, value in rows._asdict().items() if isinstance(value, Tensor)
        }
        rows = rows._replace(**fenced)
        whole = rows.vocabulary == logits.shape[-1]
        outputs = [
            zones.output(count),
            zones.output(count) if entropy and whole else None,
            zones.output(3, count),
            zones.output(3, count) if extra else None,
        ]
        kernel.rows_forward_into(z, rows, entropy, *outputs)
        if grads is not None:
            logp, stats = (outputs[0], outputs[2]) if saved is None else map(zones.input, saved)
            upstream = [None if grad is None else zones.input(grad) for grad in (*grads, sequences)]
            grad = z if inplace else zones.output(*logits.shape, dtype=logits.dtype)
            kernel.rows_backward_into(grad, z, rows, logp, stats, *upstream)
            self.grad = grad.cpu()
        zones.check()
        self.logp, self.entropy, self.stats, self.extra = (
            None if output is None else output.cpu() for output in outputs
        )


def transformed(raw: Tensor, rows: Rows) -> Tensor:
    """cap(logit_scale * (raw + bias)) in the dtype of ``raw``."""
    z = raw if rows.bias is None else raw + rows.bias.to(raw.dtype)
    z = rows.logit_scale * z
    return rows.softcap * torch.tanh(z / rows.softcap) if rows.softcap else z


def exact(logits: Tensor, rows: Rows, grad_logp: Tensor, grad_entropy: Tensor):
    """(logp, entropy, gradient of the raw logits) in float64."""
    raw = logits.detach().double().requires_grad_()
    z = transformed(raw, rows)
    temperatures = None if rows.temperatures is None else rows.temperatures.double()
    plain = rows_of(z, rows.targets, temperatures=temperatures, temperature=rows.temperature)
    logp, entropy, stats = reference.forward(RowsCall(z.detach(), plain, True, False))
    upstream = Upstream(logp, stats, grad_logp.double(), grad_entropy.double(), None)
    grad = reference.backward(RowsBackwardCall(z.detach(), plain, upstream))
    (gradient,) = torch.autograd.grad(z, raw, grad)
    return logp, entropy, gradient


def eager(logits: Tensor, rows: Rows, grad_logp: Tensor, grad_entropy: Tensor):
    """(logp, entropy, gradient) as people write it, the softmax in float32."""
    raw = logits.detach().clone().requires_grad_()
    temperature = rows.temperature if rows.temperatures is None else rows.temperatures.unsqueeze(-1)
    z = transformed(raw.float().flatten(0, 1), rows)
    log_probs = torch.log_softmax(z / temperature, dim=-1)
    logp = log_probs.gather(-1, rows.targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    (gradient,) = torch.autograd.grad((logp * grad_logp + entropy * grad_entropy).sum(), raw)
    return logp.detach(), entropy.detach(), gradient


class RowOpsKernel:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_a_transformed_logit_is_as_exact_as_eager(self, kernel, name, dtype):
        logits, targets, *grads = random_case(2, 2, 259, dtype)
        temperatures = torch.tensor([0.3, 1.0, 1.5, 4.0])
        rows = rows_of(logits, targets, temperatures=temperatures, **transform_of(name, 259))
        call = RowCall(kernel, logits, rows, grads=grads)
        results = (call.logp, call.entropy, call.grad)
        for ours, peer, truth in zip(
            results, eager(logits, rows, *grads), exact(logits, rows, *grads), strict=True
        ):
            assert_as_exact_as(ours, peer, truth, ours.dtype)

    @pytest.mark.parametrize("layout", [None, *LAYOUTS])
    def test_a_transformed_logit_in_any_layout_and_in_place(self, kernel, layout):
        logits, targets, *grads = random_case(2, 3, 67, torch.bfloat16)
        targets[2] = IGNORED
        rows = rows_of(logits, targets, **transform_of("all", 67))
        plain = RowCall(kernel, logits, rows, extra=True, grads=grads)
        strided = RowCall(kernel, logits, rows, extra=True, grads=grads, layout=layout)
        over = RowCall(kernel, logits, rows, extra=True, grads=grads, layout=layout, inplace=True)
        for name in ("logp", "entropy", "stats", "extra", "grad"):
            assert same_bits(getattr(plain, name), getattr(strided, name)), name
        assert same_bits(plain.grad, over.grad)

    def test_a_capped_minus_infinity_is_a_logit_like_any_other(self, kernel):
        logits, targets, *grads = random_case(1, 2, 40)
        logits[0, :, 10:20] = -math.inf
        targets[0] = 12
        rows = rows_of(logits, targets, softcap=2.0)
        call = RowCall(kernel, logits, rows, grads=grads)
        logp, entropy, _ = exact(logits, rows, *grads)
        torch.testing.assert_close(call.logp.double(), logp, rtol=1e-6, atol=0)
        torch.testing.assert_close(call.entropy.double(), entropy, rtol=1e-6, atol=0)
        assert (call.grad[0, :, 10:20] == 0).all() and call.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 19), (1, 2, 1031), (1, 2, 5003)], ids=str)
    def test_extra_statistics(self, kernel, shape, dtype):
        logits, targets, *_ = random_case(*shape, dtype)
        targets[-1] = logits[-1, -1].argmax()
        rows = rows_of(logits, targets, temperature=0.7, **transform_of("bias", shape[-1]))
        extra = RowCall(kernel, logits, rows, extra=True).extra
        x = transformed(logits.double().flatten(0, 1), rows) / 0.7
        squares = torch.log_softmax(x, dim=-1).mul(2).logsumexp(-1)
        torch.testing.assert_close(extra[0].double(), squares, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(extra[1].double(), x.mean(-1), rtol=1e-4, atol=1e-5)
        top = transformed(logits.float().flatten(0, 1), rows).argmax(-1)
        assert extra[2].bool().tolist() == (top == targets).tolist()

    def test_squared_probabilities_of_a_leading_logit_keep_their_digits(self, kernel):
        """log sum p^2 = log1p(Q') - 2 log1p(S'): with a lead of 20 nats it is -2 e^-20, not 0."""
        logits = torch.zeros(1, 1, 2)
        logits[0, 0, 1] = 20.0
        extra = RowCall(kernel, logits, rows_of(logits, torch.tensor([1])), extra=True).extra
        exact_value = math.log1p(math.exp(-40)) - 2 * math.log1p(math.exp(-20))
        assert extra[0].item() == pytest.approx(exact_value, rel=2e-5)

    def test_of_equal_logits_the_first_is_top(self, kernel, long_row):
        for vocabulary, ties in ((70, (3, 4, 69)), (5000, (17, 2500)), (long_row, (5, long_row - 1))):
            logits = torch.zeros(1, len(ties) + 1, vocabulary)
            logits[0, :, list(ties)] = 2.0
            targets = torch.tensor([*ties, 0])
            extra = RowCall(kernel, logits, rows_of(logits, targets), extra=True).extra
            assert extra[2].tolist() == [1.0] + [0.0] * len(ties)

    def test_statistics_of_ignored_and_masked_rows(self, kernel):
        logits, targets, *_ = random_case(1, 3, 30)
        targets[0] = IGNORED
        logits[0, 0] = math.nan
        logits[0, 1, 5:] = -math.inf
        targets[1] = int(logits[0, 1].argmax())
        call = RowCall(kernel, logits, rows_of(logits, targets), extra=True)
        assert (call.extra[:, 0] == 0).all() and (call.stats[:, 0] == 0).all()
        probs = logits[0, 1].double().softmax(-1)
        assert call.extra[0, 1].item() == pytest.approx(probs.square().sum().log().item(), rel=1e-5)
        assert call.extra[1, 1] == -math.inf and call.extra[2, 1] == 1

    def test_extra_statistics_move_no_bit_of_the_rest(self, kernel):
        logits, targets, *grads = random_case(2, 2, 2500)
        rows = rows_of(logits, targets)
        with_extra = RowCall(kernel, logits, rows, extra=True, grads=grads)
        without = RowCall(kernel, logits, rows, grads=grads)
        for name in ("logp", "entropy", "stats", "grad"):
            assert same_bits(getattr(with_extra, name), getattr(without, name)), name

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cuts", [(64,), (1, 200), (7, 8, 100)], ids=str)
    def test_slabs_give_the_whole(self, kernel, cuts, dtype):
        """M, S', E' of slabs merge to those of the row; with them and the final logp a slab's gradient is the row's."""
        logits, targets, *grads = random_case(2, 2, 203, dtype)
        targets[0] = IGNORED
        temperatures = torch.tensor([0.5, 1.0, 2.0, 0.9])
        given = {"temperatures": temperatures, **transform_of("all", 203)}
        rows = rows_of(logits, targets, **given)
        whole = RowCall(kernel, logits, rows, grads=grads)
        edges = (0, *cuts, 203)
        parts, slabs = [], []
        for first, last in itertools.pairwise(edges):
            slab = logits[..., first:last].contiguous()
            of_slab = rows._replace(bias=rows.bias[first:last].contiguous(), first=first)
            saved = (whole.logp, whole.stats)
            parts.append(RowCall(kernel, slab, of_slab, grads=grads, saved=saved))
            slabs.append((first, last))
            assert parts[-1].entropy is None
        z = transformed(logits.double().flatten(0, 1), rows)
        for part, (first, last) in zip(parts, slabs, strict=True):
            inside = (targets >= first) & (targets < last)
            expected = z.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            expected = torch.where(inside, expected, torch.nan).masked_fill(targets == IGNORED, 0.0)
            torch.testing.assert_close(part.logp.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        merged = merge(torch.stack([part.stats for part in parts]).double(), temperatures.double())
        merged[:, 0] = 0
        torch.testing.assert_close(whole.stats.double(), merged, rtol=1e-5, atol=1e-6)
        assert same_bits(torch.cat([part.grad for part in parts], dim=-1), whole.grad)

    def test_a_slab_of_minus_infinity_is_empty(self, kernel):
        logits = torch.full((1, 2, 24), -math.inf)
        logits[0, 1, 3] = math.nan
        rows = rows_of(logits, torch.tensor([30, 30]), first=8, vocabulary=40)
        stats = RowCall(kernel, logits, rows).stats
        assert stats[:, 0].tolist() == [-math.inf, 0.0, 0.0]
        assert stats[1, 1].isnan()

    @pytest.mark.parametrize("bad", [-1, 40, 2**40])
    def test_a_target_outside_the_whole_vocabulary_is_nan_in_every_slab(self, kernel, bad):
        logits, targets, *grads = random_case(1, 3, 20)
        targets += 10
        targets[1] = bad
        rows = rows_of(logits, targets, first=10, vocabulary=40)
        saved = (torch.full((3,), -1.0), torch.ones(3, 3))
        call = RowCall(kernel, logits, rows, grads=grads, saved=saved)
        assert call.logp.isnan().tolist() == [False, True, False]
        assert call.grad[0].isnan().all(-1).tolist() == [False, True, False]

    def test_gradients_by_sequence(self, kernel):
        logits, targets, *_ = random_case(2, 4, 300)
        targets[5] = IGNORED
        sequences = torch.tensor([0, 0, 2, 2, 2, 1, 1, 2], dtype=torch.int32)
        by_sequence = torch.randn(2, 3)
        rows = rows_of(logits, targets)
        looked_up = RowCall(kernel, logits, rows, grads=tuple(by_sequence), sequences=sequences)
        expanded = RowCall(kernel, logits, rows, grads=tuple(by_sequence[:, sequences.long()]))
        assert same_bits(looked_up.grad, expanded.grad)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_row_in_pieces_is_exact(self, kernel, long_row, dtype):
        logits, targets, *grads = random_case(1, 3, long_row, dtype)
        targets[1] = long_row - 1
        targets[2] = IGNORED
        rows = rows_of(logits, targets, temperature=0.8)
        call = RowCall(kernel, logits, rows, extra=True, grads=grads)
        logp, entropy, gradient = exact(logits, rows, *grads)
        torch.testing.assert_close(call.logp.double(), logp, rtol=2e-6, atol=0)
        torch.testing.assert_close(call.entropy.double(), entropy, rtol=2e-6, atol=0)
        assert (call.grad.double() - gradient).abs().max() <= 2.0**-8 * gradient.abs().max()
        x = logits.double()[0, :2] / 0.8
        torch.testing.assert_close(
            call.extra[0, :2].double(), torch.log_softmax(x, dim=-1).mul(2).logsumexp(-1), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(call.extra[1, :2].double(), x.mean(-1), rtol=1e-4, atol=1e-5)

    def test_a_long_row_leads_is_masked_or_holds_nan(self, kernel, long_row):
        """One logit leads by 30 nats in the last piece; -inf fills the first; NaN or nothing but -inf is NaN alone."""
        logits = torch.randn(1, 5, long_row, generator=torch.Generator().manual_seed(1))
        logits[0, 0, long_row - 2] = logits[0, 0].max() + 30.0
        logits[0, 1, : long_row - 9] = -math.inf
        logits[0, 2, long_row // 2] = math.nan
        logits[0, 3] = -math.inf
        targets = torch.tensor([long_row - 2, long_row - 3, 1, 2, 3])
        grads = (torch.ones(5), torch.ones(5))
        call = RowCall(kernel, logits, rows_of(logits, targets), extra=True, grads=grads)
        logp, entropy, gradient = exact(logits, rows_of(logits, targets), *grads)
        for row in (0, 1, 4):
            assert call.logp[row].item() == pytest.approx(logp[row].item(), rel=2e-5)
            assert call.entropy[row].item() == pytest.approx(entropy[row].item(), rel=2e-5)
            difference = (call.grad[0, row].double() - gradient[0, row]).abs().max()
            assert difference <= 2e-5 * gradient[0, row].abs().max()
        assert call.logp[2:4].isnan().all() and call.grad[0, 2:4].isnan().all()

    def test_a_long_row_keeps_its_bits_whatever_else_is_there(self, kernel, long_row):
        logits, targets, *grads = random_case(1, 3, long_row, torch.bfloat16)
        together = RowCall(kernel, logits, rows_of(logits, targets), grads=grads)
        for row in (0, 2):
            one = slice(row, row + 1)
            alone = RowCall(
                kernel,
                logits[:, one].contiguous(),
                rows_of(logits, targets[one]),
                grads=tuple(grad[one] for grad in grads),
            )
            assert same_bits(together.logp[one], alone.logp)
            assert same_bits(together.entropy[one], alone.entropy)
            assert same_bits(together.grad[:, one], alone.grad)


def merge(stats: Tensor, temperatures: Tensor) -> Tensor:
    """(3, N) of the whole from (slabs, 3, N), as sharded.py explains; M is not divided by the temperature."""
    largest, owner = stats[:, 0].max(0)
    distance = (largest - stats[:, 0]) / temperatures
    weights = (-distance).exp()
    owned = torch.arange(stats.shape[0]).unsqueeze(-1) == owner
    others = torch.where(owned, stats[:, 1], weights * (1 + stats[:, 1])).sum(0)
    spread = (weights * (stats[:, 2] + distance * (1 + stats[:, 1]))).sum(0)
    return torch.stack((largest, others, spread))
