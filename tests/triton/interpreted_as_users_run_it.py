"""Triton's interpreter as it is, without the repair of bfloat16 that other tests make: what users of TRITON_INTERPRET=1 get.

Run by test_interpreter.py, before the others, which make the repair for the rest of the process.
"""

import pytest
import torch

import r1kernels
from r1kernels import examples
from tests.support.sample_calls import first

REFUSED = "bfloat16, whose raw bits Triton's interpreter multiplies"
OPS = (
    "token_logprobs",
    "linear_logprobs",
    "linear_divergence",
    "grouped_logprobs",
    "linear_grpo_loss",
    "moe_experts",
    "grouped_gemm",
    "route",
)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_is_served_by_another_backend(op):
    args, kwargs = examples.calls("cpu", torch.bfloat16)[op]
    function = getattr(r1kernels, op)
    assert (
        "triton     cannot run: " in (text := r1kernels.explain(function, *args, **kwargs))
        and REFUSED in text
    )
    exact = first(function(*args, **kwargs, backend="reference"))
    torch.testing.assert_close(first(function(*args, **kwargs)), exact, rtol=2e-2, atol=2e-2)
    with pytest.raises(r1kernels.BackendError, match="raw bits"):
        function(*args, **kwargs, backend="triton")


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        *((op, torch.float32) for op in OPS),
        ("linear_logprobs", torch.float16),
        ("grouped_gemm", torch.float16),
    ],
    ids=str,
)
def test_other_dtypes_are_served_by_the_interpreter(op, dtype):
    args, kwargs = examples.calls("cpu", dtype)[op]
    function = getattr(r1kernels, op)
    assert "triton     runs" in r1kernels.explain(function, *args, **kwargs)
    exact = first(function(*args, **kwargs, backend="reference"))
    torch.testing.assert_close(first(function(*args, **kwargs)), exact, rtol=2e-3, atol=2e-3)
