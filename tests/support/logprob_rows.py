"""What the row ops of every kernel backend must do beyond plain token_logprobs: heads, slabs, statistics, sequences.

A test class inherits from ``LogprobRows`` and has a fixture ``backend`` (the name of the backend, whose ops take the tensors
that ``device`` gives). N rows, V columns.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from r1kernels.logprob import parts
from r1kernels.logprob.token import Rows
from tests.support import linear_oracle as oracle
from tests.support.numerics import same_bits
from tests.support.row_kernels import backward, backward_over, forward

IGNORED = -100
HEADS = {
    "plain": (False, 1.0, 0.0),
    "bias": (True, 1.0, 0.0),
    "scale": (False, -0.6, 0.0),
    "softcap": (False, 1.0, 5.0),
    "all": (True, 0.7, 3.0),
}


class Case:
    """Raw logits (N, V) with a head, temperatures and upstream gradients; ``exact`` in float64."""

    def __init__(
        self, head: str, tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(vocabulary)
        has_bias, self.scale, self.softcap = HEADS[head]
        self.raw = (3 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
        self.bias = torch.randn(vocabulary, generator=generator) if has_bias else None
        self.targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        self.targets[1::5] = IGNORED
        self.temperatures = torch.rand(tokens, generator=generator) + 0.5
        self.grads = torch.randn(2, tokens, generator=generator)
        self.device = device

    def exact(self) -> oracle.Results:
        logits = oracle.Head(self.bias, self.scale, self.softcap or None)
        return oracle.from_raw(self.raw, logits, self.targets, self.temperatures, *self.grads)

    def rows(self, first: int = 0, last: int | None = None) -> Rows:
        bias = None if self.bias is None else self.bias[first:last].to(self.device)
        head = (bias, self.scale, self.softcap)
        per_row = (self.targets.to(self.device), self.temperatures.to(self.device))
        return Rows(*head, *per_row, 1.0, IGNORED, first, self.raw.shape[1])

    def logits(self, first: int = 0, last: int | None = None) -> Tensor:
        """(1, N, columns), rows of stride 1 inside a larger tensor."""
        return self.raw.to(self.device)[None, :, first:last]


def assert_close(ours: Tensor, exact: Tensor, tolerance: float = 3e-6) -> None:
    scale = float(exact[exact.isfinite()].abs().max())
    torch.testing.assert_close(ours.cpu().double(), exact.double(), rtol=tolerance, atol=tolerance * scale)


class LogprobRows:
    device = "cpu"

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("vocabulary", [1, 7, 33, 2500])
    def test_every_head(self, backend, head, vocabulary):
        case = Case(head, 11, vocabulary, device=self.device)
        exact = case.exact()
        rows, logits = case.rows(), case.logits()
        logp, entropy, stats, extra = forward(backend, logits, rows, True, extra=True)
        assert_close(logp, exact.logp)
        assert_close(entropy, exact.entropy)
        assert_close(extra[0], exact.log_sum_sq_probs)
        assert_close(extra[1], exact.mean_logits)
        assert torch.equal(extra[2].cpu() == 1, exact.is_top1)
        grads = case.grads.to(self.device)
        grad = backward(backend, logits, rows, logp, stats, *grads)
        assert_close(grad[0], exact.grad)
        over = logits.clone()
        backward_over(backend, over, rows, logp, stats, *grads)
        assert same_bits(over, grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_narrow_logits(self, backend, dtype):
        case = Case("all", 6, 300, dtype, device=self.device)
        exact = case.exact()
        logp, entropy, stats, _ = forward(backend, case.logits(), case.rows(), True)
        assert_close(logp, exact.logp)
        assert_close(entropy, exact.entropy)
        grad = backward(backend, case.logits(), case.rows(), logp, stats, *case.grads.to(self.device))
        assert_close(grad[0], exact.grad, 4e-3)

    @pytest.mark.parametrize("head", ["plain", "all"])
    @pytest.mark.parametrize("bounds", [(0, 1, 3000), (0, 1000, 2048, 2999, 3000)], ids=str)
    def test_slabs_merge_to_the_whole(self, backend, head, bounds):
        case = Case(head, 9, 3000, device=self.device)
        exact = case.exact()
        slabs = list(itertools.pairwise(bounds))
        pieces = []
        for first, last in slabs:
            chosen, entropy, stats, extra = forward(
                backend, case.logits(first, last), case.rows(first, last), True, extra=True
            )
            assert entropy.shape == (0,)
            here = (case.targets >= first) & (case.targets < last)
            ignored = case.targets == IGNORED
            assert torch.equal(chosen.isnan().cpu(), ~here & ~ignored) and (chosen.cpu()[ignored] == 0).all()
            pieces.append(parts.Part(chosen, stats, extra))
        whole = case.rows()
        merged = parts.merge(pieces, list(bounds[:-1]), bounds[-1], whole)
        logp, entropy, stats, extra = parts.finish(merged, whole, True)
        assert_close(logp, exact.logp)
        assert_close(entropy, exact.entropy)
        assert_close(extra[0], exact.log_sum_sq_probs)
        assert_close(extra[1], exact.mean_logits)
        assert torch.equal(extra[2].cpu() == 1, exact.is_top1)
        grads = [
            backward(
                backend,
                case.logits(first, last),
                case.rows(first, last),
                logp,
                stats,
                *case.grads.to(self.device),
            )
            for first, last in slabs
        ]
        assert_close(torch.cat(grads, -1)[0], exact.grad)

    def test_slabs_of_minus_infinity_and_broken_rows(self, backend):
        """A slab of -inf alone adds nothing; a row of -inf alone, or with a NaN hidden in it, is NaN."""
        case = Case("plain", 5, 64, device=self.device)
        case.targets = torch.tensor([40, 3, 40, 40, 63])
        case.raw[0, :32] = -torch.inf
        case.raw[1, 32:] = -torch.inf
        case.raw[2] = -torch.inf
        case.raw[3], case.raw[3, 5] = -torch.inf, torch.nan
        pieces = []
        for first in (0, 32):
            slab = (case.logits(first, first + 32), case.rows(first, first + 32))
            chosen, _, stats, extra = forward(backend, *slab, True, extra=True)
            pieces.append(parts.Part(chosen, stats, extra))
        logp, entropy, _, _ = parts.finish(parts.merge(pieces, [0, 32], 64, case.rows()), case.rows(), True)
        good = [0, 1, 4]
        x = case.raw[good].double() / case.temperatures[good, None].double()
        exact = torch.log_softmax(x, -1)
        assert_close(logp[good], exact.gather(-1, case.targets[good, None])[:, 0])
        assert_close(entropy[good], -torch.where(exact.isinf(), 0.0, exact.exp() * exact).sum(-1))
        assert logp[[2, 3]].isnan().all() and entropy[[2, 3]].isnan().all()

    def test_gradients_looked_up_by_sequence_are_those_of_the_tokens(self, backend):
        case = Case("all", 12, 130, device=self.device)
        rows, logits = case.rows(), case.logits()
        logp, _, stats, _ = forward(backend, logits, rows, True)
        sequences = torch.tensor([0, 0, 2, 2, 2, 1, 1, 3, 3, 3, 3, 0], dtype=torch.int32, device=self.device)
        upstream = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).to(self.device)
        expanded = upstream[:, sequences.long()].contiguous()
        for used in ((0, 1), (0,), (1,)):
            few = [upstream[i] if i in used else None for i in range(2)]
            many = [expanded[i] if i in used else None for i in range(2)]
            looked_up = backward(backend, logits, rows, logp, stats, *few, sequences)
            assert same_bits(looked_up, backward(backend, logits, rows, logp, stats, *many))

    def test_the_first_of_several_largest_is_the_top(self, backend):
        logits = torch.zeros(1, 4, 5000, device=self.device)
        logits[0, :, 2100] = logits[0, :, 4000] = 7.0
        targets = torch.tensor([2100, 4000, 0, 2100], device=self.device)
        rows = Rows(None, 1.0, 0.0, targets, None, 1.0, IGNORED, 0, 5000)
        extra = forward(backend, logits, rows, False, extra=True)[3]
        assert extra[2].tolist() == [1, 0, 0, 1]
