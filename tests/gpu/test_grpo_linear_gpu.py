"""linear_grpo_loss on a GPU: the kernel backends against the reference in float64, syncs, bits.

Written for hardware that most machines lack: `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels.grpo import grpo_preset, linear_grpo_loss
from tests.support.gpu_streams import without_waiting
from tests.support.numerics import assert_as_exact_as, same_bits

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)


def gpu_call(dtype, tokens=200, vocabulary=5003, width=64):
    """(hidden, weight), the tensors beside them; a third of the tokens do not count, and their hidden states are NaN."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, generator=generator).to("cuda", dtype)
        for size in ((4, tokens, width), (vocabulary, width))
    )
    targets = torch.randint(0, vocabulary, (4, tokens), generator=generator).cuda()
    mask = (torch.rand(4, tokens, generator=generator) > 0.3).cuda()
    old = torch.full((4, tokens), -8.5).cuda() + 0.3 * torch.randn(4, tokens, generator=generator).cuda()
    advantages = torch.randn(4, generator=generator).cuda()
    hidden = torch.where(mask.unsqueeze(-1), hidden, torch.nan)
    return (hidden, weight / width**0.5), (targets, old, advantages, mask)


def run(backend, leaves, beside, dtype=None, **keywords):
    leaves = [(leaf if dtype is None else leaf.to(dtype)).detach().requires_grad_() for leaf in leaves]
    output = linear_grpo_loss(*leaves, *beside, **keywords, backend=backend)
    return output.metrics.tensor, *torch.autograd.grad(output.loss, leaves)


@pytest.mark.parametrize("chunk_size", [None, 64])
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_the_two_ops(backend, dtype, preset, chunk_size):
    leaves, beside = gpu_call(dtype)
    keywords = {**grpo_preset(preset), "entropy_coef": 0.1, "chunk_size": chunk_size}
    ours, eager = (run(name, leaves, beside, **keywords) for name in (backend, "reference"))
    exact = run("reference", leaves, beside, torch.float64, **keywords)
    assert_as_exact_as(ours[0], eager[0], exact[0], torch.float32)
    for mine, other, truth in zip(ours[1:], eager[1:], exact[1:], strict=True):
        assert_as_exact_as(mine, other, truth, dtype)


def test_the_same_bits_and_no_wait_for_the_gpu(backend):
    leaves, beside = gpu_call(torch.bfloat16)
    keywords = {**grpo_preset("dapo"), "entropy_coef": 0.1}
    first = run(backend, leaves, beside, **keywords)
    with without_waiting():
        second = run(backend, leaves, beside, **keywords)
    assert all(same_bits(one.cpu(), other.cpu()) for one, other in zip(first, second, strict=True))
