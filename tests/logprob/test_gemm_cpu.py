"""The op gemm_bf16_cpu: products of bfloat16 values with float32 accumulators."""

from __future__ import annotations

import pytest
import torch

from r1kernels import extension
from r1kernels.logprob.cpu import is_ours
from tests.support.numerics import same_bits
from tests.support.redzones import Redzones

gemm = torch.ops.r1kernels.gemm_bf16_cpu


@pytest.fixture(autouse=True)
def _processor():
    if extension.missing() is not None or not is_ours(torch.bfloat16):
        pytest.skip("this processor multiplies no bfloat16")


def operand(rows, columns, dtype, turned, zones=None):
    values = torch.randn(rows, columns).to(dtype)
    if zones is None:
        return values.t().contiguous().t() if turned else values
    view = (lambda buffer: buffer.t()) if turned else (lambda buffer: buffer)
    return zones.input(values, view, (columns, rows) if turned else None)


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 1, 1), (7, 5, 3), (6, 64, 64), (16, 64, 64), (97, 33, 65), (200, 1500, 130), (13, 2049, 70)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_products(m, k, n, dtype, turned):
    zones = Redzones()
    a = operand(m, k, dtype, turned[0], zones)
    b = operand(k, n, torch.bfloat16, turned[1], zones)
    out = zones.output(m, n)
    exact = a.bfloat16().double() @ b.double()
    gemm(a, b, out, False)
    zones.check()
    scale = float(exact.abs().max())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3e-6 * scale)
    gemm(a, b, out, True)
    zones.check()
    torch.testing.assert_close(out.double(), 2 * exact, rtol=0, atol=6e-6 * scale)


def test_a_row_has_the_same_bits_in_any_company_and_with_any_threads():
    a, b = torch.randn(300, 1100).bfloat16(), torch.randn(1100, 200).bfloat16()
    whole, alone, part = torch.empty(300, 200), torch.empty(1, 200), torch.empty(300, 7)
    gemm(a, b, whole, False)
    gemm(a[111:112], b, alone, False)
    gemm(a, b[:, 64:71], part, False)
    assert same_bits(whole[111:112], alone) and same_bits(whole[:, 64:71].contiguous(), part)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = torch.empty_like(whole)
        gemm(a, b, threaded, False)
    finally:
        torch.set_num_threads(before)
    assert same_bits(whole, threaded)


def test_torch_s_products_between_ours_are_right():
    """Both may use the processor's tile registers, whose shapes each sets for itself."""
    a, b = torch.randn(96, 128).bfloat16(), torch.randn(128, 64).bfloat16()
    exact = a.double() @ b.double()
    for _ in range(3):
        ours, torch_s = torch.empty(96, 64), a @ b
        gemm(a, b, ours, False)
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch_s.double(), exact, rtol=0, atol=0.2)


def test_nan_and_infinity_stay_in_their_rows():
    a, b = torch.randn(20, 50), torch.randn(50, 30).bfloat16()
    a[3, 7], a[11, 0] = torch.nan, torch.inf
    out = torch.empty(20, 30)
    gemm(a, b, out, False)
    assert out[3].isnan().all() and out[11].isinf().all()
    assert torch.isfinite(out[[i for i in range(20) if i not in (3, 11)]]).all()


def test_float32_is_rounded_to_nearest_even():
    values = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20]])
    out = torch.empty(1, 4)
    for a in (values, values.t().contiguous().t()):
        gemm(a, torch.eye(4).bfloat16(), out, False)
        assert same_bits(out, values.bfloat16().float())


def test_of_no_products_the_sum_is_0():
    a, b, out = torch.randn(7, 0), torch.randn(0, 70).bfloat16(), torch.full((7, 70), torch.nan)
    gemm(a, b, out, False)
    assert (out == 0).all()
    gemm(a, b, out.fill_(3.0), True)
    assert (out == 3).all()


def test_opcheck():
    arguments = (torch.randn(3, 5), torch.randn(5, 4).bfloat16(), torch.zeros(3, 4), True)
    torch.library.opcheck(gemm.default, arguments)


def test_wrong_shapes_are_errors():
    with pytest.raises(RuntimeError, match=r"expected shapes \(m, k\), \(k, n\), \(m, n\)"):
        gemm(torch.zeros(3, 5), torch.zeros(4, 4), torch.zeros(3, 4), False)
    with pytest.raises(RuntimeError, match="out: expected float32"):
        gemm(torch.zeros(3, 5), torch.zeros(5, 4), torch.zeros(3, 4).bfloat16(), False)
