"""The Triton kernels of kept rows of the head, compiled for GPUs that are not here: they compile, fit and do not spill."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from r1kernels.logprob import triton_kept
from r1kernels.logprob.kept_head import ProductsBackwardCall, ProductsCall
from tests.support import offline_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = ((90, torch.bfloat16),)
MATRIX = [
    pytest.param(*variant, marks=[] if variant in FEW else pytest.mark.slow)
    for variant in itertools.product(offline_triton.SHARED_BYTES, DTYPES)
]


def launch(dtype, width, entries=20, tokens=3, bias=True):
    hidden, weight = torch.empty(tokens, width, dtype=dtype), torch.empty(11, width, dtype=dtype)
    ids, row = torch.zeros(entries, dtype=torch.int64), torch.zeros(entries)
    sums = torch.zeros(11) if bias else None
    triton_kept.products_into(ProductsCall(hidden, weight, sums, ids, ids, 0), row)
    offsets = torch.zeros(tokens + 1, dtype=torch.int64)
    call = ProductsBackwardCall(
        row, hidden, weight, ids, ids, offsets, ids, 0, False, True, True, need_bias=bias
    )
    triton_kept.backward_into(call, hidden, weight, torch.zeros(11))


@pytest.mark.parametrize(("capability", "dtype"), MATRIX)
def test_every_kernel_fits_and_does_not_spill(tmp_path, capability, dtype):
    with offline_triton.compile_only(capability) as compiled:
        launch(dtype, 896)
        launch(dtype, 37, bias=False)
    assert len(compiled) == 6
    for needs in offline_triton.resources(compiled, tmp_path):
        assert needs.stack_bytes == 0 and needs.spill_instructions == 0, needs.name
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability]
        assert needs.registers <= 128, "less than 16 warps fit on a processor"


def test_no_length_compiles_a_kernel_anew():
    with offline_triton.specialise_only(80) as launched:
        for width, entries, tokens in ((896, 20, 3), (64, 1, 1), (37, 4097, 16)):
            launch(torch.float32, width, entries, tokens)
    assert len(set(launched)) == 3
