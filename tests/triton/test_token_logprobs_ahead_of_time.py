"""The Triton kernels of token_logprobs, compiled for GPUs that are not here: they compile, fit and do not spill."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from r1kernels.logprob import triton as backend
from tests.support import offline_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (4096, 4099)  # rows on a vector's boundary, and not
FEW = ((80, torch.float32, 4099), (90, torch.bfloat16, 4096))
MATRIX = [
    pytest.param(*variant, marks=[] if variant in FEW else pytest.mark.slow)
    for variant in itertools.product(offline_triton.SHARED_BYTES, DTYPES, VOCABULARIES)
]


@pytest.mark.parametrize(("capability", "dtype", "vocabulary"), MATRIX)
def test_every_kernel_fits_and_does_not_spill(tmp_path, capability, dtype, vocabulary):
    logits = torch.empty(2, 3, vocabulary, dtype=dtype)
    targets, row, stats = torch.zeros(6, dtype=torch.int64), torch.zeros(6), torch.zeros(3, 6)
    with offline_triton.compile_only(capability) as compiled:
        call = (logits, targets, None, 1.0, -100)
        per_row = (logits, targets, row, 1.0, -100)
        backend.forward_into(*call, row, None, stats)
        backend.forward_into(*per_row, row, row, stats)
        backend.backward_into(torch.empty_like(logits), *call, row, stats, row, None)
        backend.backward_into(torch.empty_like(logits), *call, row, stats, None, row)
        backend.backward_into(torch.empty_like(logits), *per_row, row, stats, row, row)
    assert len(compiled) == 5
    for kernel in compiled:
        needs = offline_triton.resources(kernel, tmp_path)
        assert needs.stack_bytes == 0 and needs.spill_instructions == 0, kernel.name
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability]
        assert needs.registers <= 128, "less than 16 warps fit on a processor"
        if vocabulary == 4096:
            assert needs.widest_load_bits() == 128, "the loads of aligned rows are not vectors"


def test_no_length_compiles_a_kernel_anew():
    """B, T and the strides are not specialised on, nor V but for whether rows lie on a vector's boundary."""
    shapes = [(1, 1, 4099), (2, 7, 4099), (16, 16, 1), (1, 1, 3), (3, 5, 2**17 + 1)]
    with offline_triton.compile_only(80) as compiled:
        for batch, tokens, vocabulary in shapes:
            logits = torch.empty(batch, tokens, vocabulary)
            targets, row = torch.zeros(batch * tokens, dtype=torch.int64), torch.zeros(batch * tokens)
            backend.forward_into(logits, targets, None, 0.5, -100, row, row, row.expand(3, -1))
            backend.backward_into(logits, logits, targets, None, 0.5, -100, row, row.expand(3, -1), row, row)
    assert len(compiled) == 2 * len(shapes)
    assert len({kernel.hash for kernel in compiled}) == 2
