"""The Triton kernels of GRPO, compiled for GPUs that are not here: they compile, fit and do not spill."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from r1kernels.grpo import triton as backend
from r1kernels.grpo.advantages import AdvantagesCall
from r1kernels.grpo.kl import ESTIMATORS
from r1kernels.grpo.loss import BackwardCall, KernelCall, Tokens
from r1kernels.grpo.objective import RATIOS, VARIANTS, Numbers
from r1kernels.grpo.reductions import COUNTS
from tests.support import offline_triton

CALLS = (  # variant, ratio, KL, count, packed
    ("grpo", "token", "k3", "sequence", False),
    ("dual_clip", "sequence", "unbiased", "batch", True),
    ("cispo", "token", "abs", "one", True),
    ("cispo", "output", "k3", "one", False),
    ("sapo", "sequence", "k1", "longest", True),
    ("vespo", "token", "k3_plus", "batch", False),
    ("gmpo", "token", "k2", "sequence", True),
    ("reinforce", "token", "unbiased", "one", False),
)
FEW = ((90, CALLS[0]), (80, CALLS[1]))
MATRIX = [
    pytest.param(*point, marks=[] if point in FEW else pytest.mark.slow)
    for point in itertools.product(offline_triton.SHARED_BYTES, CALLS)
]


def launch(variant, ratio, kl, count, packed, sequences=3, length=700, factor=1.0):
    """Forward and backward with everything given (padded), or with as little as may be and values for tokens (packed)."""
    shape = (sequences * length,) if packed else (sequences, length)
    tokens, per_sequence = torch.zeros(shape), torch.zeros(sequences, 1)
    mask = torch.zeros(shape, dtype=torch.int64 if packed else torch.bool)
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32) if packed else None
    given = Tokens(
        logp=tokens,
        old_logp=None if packed else tokens,
        advantages=tokens if packed else per_sequence,
        mask=mask,
        ref_logp=tokens,
        policy_weights=tokens if packed else per_sequence,
        entropy=tokens,
        entropy_weights=None if packed else tokens,
        weights=None,
        cu_seqlens=cu_seqlens,
    )
    call = KernelCall(
        tokens=given,
        numbers=torch.full((len(Numbers._fields),), factor),
        total=torch.ones(1) if packed else None,
        variant=VARIANTS.index(variant),
        ratio=RATIOS.index(ratio),
        kl=ESTIMATORS.index(kl),
        counted=COUNTS.index(count),
        logp_gradient=True,
        entropy_gradient=True,
    )
    _, _, *grads = backend.loss_forward(call)
    logp = tokens if ratio != "token" else None
    backend.loss_backward(BackwardCall(torch.ones(()), *grads, mask, cu_seqlens, logp))


def assert_light(compiled, folder, capability):
    for needs in offline_triton.resources(compiled, folder):
        # on sm_100 a predicate of the advantages, written and read once
        most = 8 if capability == 100 and needs.name == "advantages_kernel" else 0
        assert needs.stack_bytes <= most and needs.spill_instructions <= most // 4, needs.name
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability]
        assert needs.registers <= 128, "less than 4 programs fit on a processor"


@pytest.mark.parametrize(("capability", "call"), MATRIX)
def test_every_kernel_of_the_loss_fits_and_does_not_spill(tmp_path, capability, call):
    with offline_triton.compile_only(capability) as compiled:
        launch(*call)
    assert [kernel.name for kernel in compiled] == ["sums_kernel", "loss_kernel", "backward_kernel"]
    assert_light(compiled, tmp_path, capability)


@pytest.mark.parametrize(
    "capability",
    [pytest.param(c, marks=[] if c == 90 else pytest.mark.slow) for c in offline_triton.SHARED_BYTES],
)
def test_the_kernel_of_the_advantages_fits_and_does_not_spill(tmp_path, capability):
    rewards, ids = torch.zeros(64), torch.zeros(64, dtype=torch.int64)
    with offline_triton.compile_only(capability) as compiled:
        for scale in range(3):
            eps = torch.tensor(1e-4)
            backend.group_advantages(AdvantagesCall(rewards, 4, None, rewards > 0, scale, eps, False))
            backend.group_advantages(AdvantagesCall(rewards, 0, ids, None, scale, eps, False))
    assert len(compiled) == 6
    assert_light(compiled, tmp_path, capability)


def test_no_size_and_no_number_compiles_a_kernel_anew():
    sizes = ((1, 1), (3, 700), (16, 16), (2, 1024), (5, 1))
    with offline_triton.specialise_only(80) as launched:
        for (sequences, length), packed in itertools.product(sizes, (False, True)):
            factor = 1.0 if length == 1 else 0.1 * length
            count = "longest" if packed else "sequence"
            launch("grpo", "sequence", "k3", count, packed, sequences, length, factor)
        for size in (1, 16, 33):
            eps = torch.tensor(1e-4 * size)
            backend.group_advantages(AdvantagesCall(torch.zeros(size), size, None, None, 0, eps, False))
    assert len(launched) == 2 * 3 * len(sizes) + 3
    assert len(set(launched)) == 2 * 3 + 1
