"""The Triton kernels of the row ops, compiled for GPUs that are not here: they compile, fit and do not spill."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from r1kernels.logprob import triton as backend
from r1kernels.logprob.token import SEGMENT, Rows, Upstream, row_results
from tests.support import offline_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (4096, 4099, 3 * SEGMENT)  # rows on a vector's boundary, and not; rows in segments
FEW = ((80, torch.float32, 4099), (90, torch.bfloat16, 3 * SEGMENT))
MATRIX = [
    pytest.param(*variant, marks=[] if variant in FEW else pytest.mark.slow)
    for variant in itertools.product(offline_triton.SHARED_BYTES, DTYPES, VOCABULARIES)
]
HEAD = {"bias": torch.zeros(1), "logit_scale": 0.5, "softcap": 30.0}


def rows_of(vocabulary, count=6, **given):
    plain = Rows(None, 1.0, 0.0, torch.zeros(count, dtype=torch.int64), None, 1.0, -100, 0, vocabulary)
    return plain._replace(**given)


def forward(logits, rows, entropy, extra):
    count = logits.shape[0] * logits.shape[1]
    outputs = row_results(logits, count, logits.shape[2], rows, entropy, extra)
    backend.forward_into(logits, rows, entropy, *outputs)


def backward(logits, rows, grad_logp, grad_entropy, sequences=None, dtype=None):
    count = logits.shape[0] * logits.shape[1]
    grad = torch.empty_like(logits, dtype=dtype)
    upstream = Upstream(torch.zeros(count), torch.zeros(3, count), grad_logp, grad_entropy, sequences)
    backend.backward_into(grad, logits, rows, upstream)


@pytest.mark.parametrize(("capability", "dtype", "vocabulary"), MATRIX)
def test_every_kernel_fits_and_does_not_spill(tmp_path, capability, dtype, vocabulary):
    logits, row = torch.empty(2, 3, vocabulary, dtype=dtype), torch.zeros(6)
    plain, of_tokens = rows_of(vocabulary), rows_of(vocabulary, temperatures=row)
    headed = rows_of(vocabulary, **HEAD)
    slab = rows_of(2 * vocabulary, first=vocabulary)
    with offline_triton.compile_only(capability) as compiled:
        for rows, entropy, extra in ((plain, False, False), (of_tokens, True, False), (headed, True, True)):
            forward(logits, rows, entropy, extra)
        forward(logits, slab, True, False)
        backward(logits, plain, row, None)
        backward(logits, of_tokens, None, row)
        backward(logits, headed, row, row)
        backward(logits, slab, row, row, sequences=row.int())
        if dtype == torch.float32:
            backward(logits, headed, row, row, dtype=torch.bfloat16)
    for kernel in compiled:
        needs = offline_triton.resources(kernel, tmp_path)
        assert needs.stack_bytes == 0 and needs.spill_instructions == 0, kernel.name
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability]
        assert needs.registers <= 128, "less than 16 warps fit on a processor"
        if vocabulary % 8 == 0 and kernel.name != "finish_kernel":
            assert needs.widest_load_bits() == 128, "the loads of aligned rows are not vectors"


def test_no_length_compiles_a_kernel_anew():
    """B, T, the strides and the place of a slab are not specialised on, nor V but for whether rows lie on a vector's
    boundary and come in segments."""
    shapes = [(1, 1, 4099), (2, 7, 4099), (16, 16, 1), (1, 1, 3), (3, 5, 2**14 + 1)]
    with offline_triton.specialise_only(80) as launched:
        for batch, tokens, vocabulary in shapes:
            logits, row = torch.empty(batch, tokens, vocabulary), torch.zeros(batch * tokens)
            rows = rows_of(vocabulary + 10 * tokens, batch * tokens, first=tokens, temperature=0.5)
            forward(logits, rows, True, False)
            backward(logits, rows, row, row)
        for vocabulary in (3 * 2**15 + 1, 5 * 2**15 + 7):
            forward(torch.empty(2, 3, vocabulary), rows_of(vocabulary), True, False)
    names = [name for name, _ in launched]
    assert names.count("finish_kernel") == 2 and len(names) == 2 * len(shapes) + 4
    # forward of a slab in one piece and of rows in segments, the merge of segments, backward
    assert len(set(launched)) == 4
