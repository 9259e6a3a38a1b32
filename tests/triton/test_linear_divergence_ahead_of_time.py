"""The Triton kernels of divergences, compiled for GPUs that are not here: they compile, fit and do not spill."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from r1kernels.logprob import triton_divergence
from r1kernels.logprob.divergence_rows import Pair, PairBackwardCall, PairCall, TeacherRows
from r1kernels.logprob.token import Rows
from tests.support import offline_triton

HEAD = {"bias": torch.zeros(1), "logit_scale": 0.5, "softcap": 30.0}
FEW = ((90, 4096),)
MATRIX = [
    pytest.param(*variant, marks=[] if variant in FEW else pytest.mark.slow)
    for variant in itertools.product(offline_triton.SHARED_BYTES, (4096, 4099))
]


def launch(vocabulary, kind, batch=2, tokens=3, **given):
    logits, count = torch.empty(batch, tokens, vocabulary), batch * tokens
    targets, row, stats = torch.zeros(count, dtype=torch.int64), torch.zeros(count), torch.zeros(3, count)
    rows = Rows(None, 1.0, 0.0, targets, None, 1.0, -100, 0, vocabulary)._replace(**given)
    pair = Pair(rows, TeacherRows.of(rows), stats, stats, kind, 0.5)
    triton_divergence.sums(PairCall(logits, logits, pair))
    triton_divergence.gradient_over(PairBackwardCall(logits, logits, pair, stats[:2], row))


@pytest.mark.parametrize(("capability", "vocabulary"), MATRIX)
def test_every_kernel_fits_and_does_not_spill(tmp_path, capability, vocabulary):
    with offline_triton.compile_only(capability) as compiled:
        launch(vocabulary, 0)
        launch(vocabulary, 1)
        launch(vocabulary, 2, temperatures=torch.zeros(6), **HEAD)
    assert len(compiled) == 6
    for needs in offline_triton.resources(compiled, tmp_path):
        assert needs.stack_bytes == 0 and needs.spill_instructions == 0, needs.name
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability]
        assert needs.registers <= 128, "less than 16 warps fit on a processor"
        if vocabulary % 4 == 0:
            assert needs.widest_load_bits() == 128, "the loads of aligned rows are not vectors"


def test_no_length_compiles_a_kernel_anew():
    with offline_triton.specialise_only(80) as launched:
        for batch, tokens, vocabulary in ((1, 1, 4099), (2, 7, 4099), (16, 16, 1), (1, 1, 3)):
            launch(vocabulary, 0, batch, tokens, temperature=0.5)
    assert len(set(launched)) == 2
