"""The attentions that parts of a tree are merged from: each against softmax in float64."""

from __future__ import annotations

import pytest
import torch

from r1kernels.integrations.prefix_kernels import (
    EAGER,
    EFFICIENT_CUDA,
    FLASH_CPU,
    FLASH_CUDA,
    Operands,
    Options,
)
from tests.support import prefix_kernels as cases


@pytest.mark.parametrize("window", [0, 1, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernel", [FLASH_CPU, EAGER], ids=lambda kernel: kernel.name)
def test_parts_merge_to_the_softmax_over_a_path(kernel, dtype, window):
    tree, tensors = cases.inputs(dtype, "cpu")
    found = cases.run(kernel, tree, tensors, window)
    bound = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    assert max(cases.errors(found, cases.expected(tree, tensors, window))) < bound
    assert [one.dtype for one in found] == [dtype] * 5


@pytest.mark.parametrize("value_size", [8, 24])
def test_a_soft_cap_and_values_of_another_size(value_size):
    tree, tensors = cases.inputs(torch.float64, "cpu", value_size=value_size)
    found = cases.run(EAGER, tree, tensors, 24, softcap=2.0)
    assert max(cases.errors(found, cases.expected(tree, tensors, 24, softcap=2.0))) < 1e-12


@pytest.mark.parametrize(
    ("kernel", "masked"),
    [(FLASH_CUDA, False), (EFFICIENT_CUDA, False), (EFFICIENT_CUDA, True)],
    ids=["flash", "efficient", "efficient-masked"],
)
def test_the_ops_of_cuda_are_called_as_they_are_declared(kernel, masked):
    q, k, v = (
        torch.empty(1, n, t, 16, dtype=torch.bfloat16, device="meta") for n, t in ((4, 40), (2, 25), (2, 25))
    )
    mask = torch.empty(40, 25, dtype=torch.bfloat16, device="meta") if masked else None
    operands = Operands(q, k, v, False, mask, Options(0.3, None))
    o, lse = kernel.forward(operands)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (1, 4, 40), torch.float32)
    grads = kernel.backward(operands, o, o, lse)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
