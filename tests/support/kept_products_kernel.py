"""What every kernel of kept rows of the head must do, whatever runs it: products of entries, and their gradients.

A test class inherits from ``KeptProductsKernel`` and has a fixture ``kernel`` with

    device
    products_into(call: ProductsCall, raw)
    backward_into(call: ProductsBackwardCall, for_hidden, for_weight, for_bias)

Tensors lie in redzones. N tokens, H hidden, V vocabulary, Z entries.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1kernels.logprob.kept import EntriesCall, entries
from r1kernels.logprob.kept_head import ProductsBackwardCall, ProductsCall
from tests.support.kept_case import IGNORED, in_csr, sets_around
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.redzones import Redzones

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = [0, 1, 5, 40, 3, 17, 0, 9]


class Case:
    """Some tokens share rows of the head; token 4 is ignored and holds NaN, set 5 has an id twice."""

    def __init__(
        self, width: int = 37, dtype: torch.dtype = torch.float32, first: int = 0, columns: int = 61
    ):
        generator = torch.Generator().manual_seed(width)
        targets = torch.randint(0, 61, (len(LENGTHS),), generator=generator)
        sets = sets_around(targets, LENGTHS, 61, seed=width)
        sets[5].append(sets[5][0])
        targets[4] = IGNORED
        self.ids, self.offsets = in_csr(sets)
        found = entries(EntriesCall(self.ids, self.offsets, targets, IGNORED, 61))
        self.tokens, self.order, *_ = found
        self.first = first

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.hidden, self.weight = normal(len(LENGTHS), width).to(dtype), normal(columns, width).to(dtype)
        self.hidden[4] = torch.nan
        self.bias = normal(columns)
        self.grad = normal(len(self.ids)).masked_fill(self.tokens < 0, 0.0)

    def run(self, kernel, needs=(True, True, True), slab=False) -> list[Tensor]:
        """raw, and the gradients of hidden, weight and bias; those not needed are empty."""
        zones = Redzones(kernel.device)
        raw = zones.output(len(self.ids))
        hidden, weight, ids, tokens = map(zones.input, (self.hidden, self.weight, self.ids, self.tokens))
        kernel.products_into(
            ProductsCall(hidden, weight, zones.input(self.bias), ids, tokens, self.first), raw
        )
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        dtypes = (torch.float32 if slab else hidden.dtype, weight.dtype, torch.float32)
        results = [
            zones.output(*(shape if needed else (0,)), dtype=dtype)
            for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
        ]
        for result in results[1:]:
            result.zero_()
        call = ProductsBackwardCall(
            *map(zones.input, (self.grad, self.hidden, self.weight)),
            ids,
            tokens,
            zones.input(self.offsets),
            zones.input(self.order),
            self.first,
            slab,
            *needs,
        )
        kernel.backward_into(call, *results)
        zones.check()
        return [result.cpu() for result in (raw, *results)]

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by plain PyTorch in this dtype, entry by entry."""
        hidden, weight = self.hidden.to(dtype), self.weight.to(dtype)
        row, here = self.ids - self.first, torch.ones_like(self.ids, dtype=torch.bool)
        here = (row >= 0) & (row < len(weight)) & (self.tokens >= 0)
        x, w = hidden[self.tokens[here]], weight[row[here]]
        raw = torch.zeros(len(self.ids), dtype=dtype)
        raw[here] = (x * w).sum(1) + self.bias.to(dtype)[row[here]]
        g = self.grad.to(dtype)[here].unsqueeze(1)
        return [
            raw,
            torch.zeros_like(hidden).index_add(0, self.tokens[here], g * w),
            torch.zeros_like(weight).index_add(0, row[here], g * x),
            torch.zeros(len(weight), dtype=dtype).index_add(0, row[here], g.squeeze(1)),
        ]


class KeptProductsKernel:
    @pytest.mark.parametrize(
        ("width", "dtype"), [(1, torch.float32), *((37, dtype) for dtype in DTYPES), (300, torch.bfloat16)]
    )
    def test_products_and_gradients(self, kernel, width, dtype):
        case = Case(width, dtype)
        eager = case.dense(torch.float32)
        for ours, peer, exact in zip(case.run(kernel), eager, case.dense(torch.float64), strict=True):
            assert_as_exact_as(ours, peer.to(ours.dtype), exact, ours.dtype)

    def test_some_rows_of_a_larger_head(self, kernel):
        """The gradient of hidden is then a part of a sum, in float32."""
        case = Case(37, torch.bfloat16, first=20, columns=13)
        for ours, peer, exact in zip(
            case.run(kernel, slab=True), case.dense(torch.float32), case.dense(torch.float64), strict=True
        ):
            assert_as_exact_as(ours, peer.to(ours.dtype), exact, ours.dtype)

    def test_what_is_not_needed_is_not_written(self, kernel):
        case = Case()
        _, *everything = case.run(kernel)
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            _, *some = case.run(kernel, needs)
            for needed, one, other in zip(needs, some, everything, strict=True):
                assert same_bits(one, other) if needed else one.numel() == 0

    def test_indices_that_are_none_reach_nothing_outside(self, kernel):
        """On a GPU no one has looked at the ids."""
        case = Case()
        bad = torch.tensor([-1, 61, 2**40, -(2**40)])
        case.ids[1:5] = bad
        case.order = case.ids.argsort(stable=True)
        case.tokens[1:5] = -1
        raw, *_ = case.run(kernel)
        assert raw[1:5].eq(0).all() and raw[5:][case.tokens[5:] >= 0].isfinite().all()

    def test_nothing_kept(self, kernel):
        case = Case()
        case.ids = case.tokens = case.order = torch.zeros(0, dtype=torch.int64)
        case.offsets, case.grad = torch.zeros(len(LENGTHS) + 1, dtype=torch.int64), torch.zeros(0)
        raw, *grads = case.run(kernel)
        assert raw.numel() == 0 and all(grad.eq(0).all() for grad in grads)

    def test_a_token_has_the_same_bits_in_any_company(self, kernel):
        case = Case(300, torch.bfloat16)
        needs = (True, False, False)
        raw, for_hidden, *_ = case.run(kernel, needs)
        alone = Case(300, torch.bfloat16)
        begin, end = alone.offsets[3:5].tolist()
        alone.ids, alone.grad = alone.ids[begin:end], alone.grad[begin:end]
        alone.tokens, alone.order = torch.zeros_like(alone.ids), alone.ids.argsort(stable=True)
        alone.offsets, alone.hidden = torch.tensor([0, end - begin]), alone.hidden[3:4]
        mine, grad, *_ = alone.run(kernel, needs)
        assert same_bits(mine, raw[begin:end]) and same_bits(grad, for_hidden[3:4])
