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
KINDS = ("plain", "temperatures", "headed", "slab")
# every kind once, and the one that needs most registers at vectors and without
FEW = (
    (80, torch.float32, 4099, ("temperatures", "headed", "slab")),
    (90, torch.bfloat16, 3 * SEGMENT, ("plain", "headed")),
)
MATRIX = [
    *FEW,
    *(
        pytest.param(*point, KINDS, marks=pytest.mark.slow)
        for point in itertools.product(offline_triton.SHARED_BYTES, DTYPES, VOCABULARIES)
    ),
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


def launch(kind, logits):
    vocabulary, row = logits.shape[2], torch.zeros(6)
    if kind == "plain":
        rows = rows_of(vocabulary)
        forward(logits, rows, False, False)
        backward(logits, rows, row, None)
    elif kind == "temperatures":
        rows = rows_of(vocabulary, temperatures=row)
        forward(logits, rows, True, False)
        backward(logits, rows, None, row)
    elif kind == "headed":
        rows = rows_of(vocabulary, **HEAD)
        forward(logits, rows, True, True)
        backward(logits, rows, row, row)
        if logits.dtype == torch.float32:
            backward(logits, rows, row, row, dtype=torch.bfloat16)
    elif kind == "slab":
        rows = rows_of(2 * vocabulary, first=vocabulary)
        forward(logits, rows, True, False)
        backward(logits, rows, row, row, sequences=row.int())


@pytest.mark.parametrize(("capability", "dtype", "vocabulary", "kinds"), MATRIX)
def test_every_kernel_fits_and_does_not_spill(tmp_path, capability, dtype, vocabulary, kinds):
    logits = torch.empty(2, 3, vocabulary, dtype=dtype)
    with offline_triton.compile_only(capability) as compiled:
        for kind in kinds:
            launch(kind, logits)
    for needs in offline_triton.resources(compiled, tmp_path):
        assert needs.stack_bytes == 0 and needs.spill_instructions == 0, needs.name
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability]
        assert needs.registers <= 128, "less than 16 warps fit on a processor"
        if vocabulary % 8 == 0 and needs.name != "finish_kernel":
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
