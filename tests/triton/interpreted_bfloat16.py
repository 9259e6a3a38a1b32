"""The repair of bfloat16 in Triton's interpreter, against PyTorch, and the check of overflow, which is made quicker there.

Run by test_interpreter.py.
"""

import operator

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.support import interpreter_bfloat16
from tests.support.numerics import same_bits

interpreter_bfloat16.repair()


@triton.jit
def arithmetic_kernel(x, y, out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "multiply":
        result = a * b
    elif OPERATION == "negate":
        result = -a
    elif OPERATION == "maximum":
        result = tl.maximum(a, b)
    elif OPERATION == "less":
        result = tl.where(a < b, a, b)
    else:
        result = a.to(tl.float32) * 1.0001
    tl.store(out + at, result.to(tl.bfloat16))


@triton.jit
def dot_kernel(x, y, out, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = rows * SIZE + columns
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


EXPECTED = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "negate": lambda a, b: -a,
    "maximum": torch.maximum,
    "less": torch.minimum,
    "round": lambda a, b: (a.float() * 1.0001).bfloat16(),
}


@pytest.mark.parametrize("operation", EXPECTED)
def test_arithmetic_rounds_as_torch_does(operation):
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.full_like(x, torch.nan)
    arithmetic_kernel[(1,)](x, y, out, OPERATION=operation, SIZE=4096)
    assert same_bits(out, EXPECTED[operation](x, y))


def test_a_dot_multiplies_values_and_not_bits():
    x, y = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.full((32, 32), torch.nan)
    dot_kernel[(1,)](x, y, out, SIZE=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def integer_kernel(x, y, out, OPERATION: tl.constexpr):
    a, b = tl.load(x), tl.load(y)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "sub":
        result = a - b
    else:
        result = a * b
    tl.store(out, result)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_an_integer_that_overflows_is_an_error(operation, dtype):
    limits = torch.iinfo(dtype)
    function = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[operation]
    first, fits, overflows = {
        "add": (limits.max - 1, 1, 2),
        "sub": (limits.min + 1, 1, 2),
        "mul": (limits.max, 1, 2),
    }[operation]
    out = torch.zeros(1, dtype=dtype)

    def run(second):
        x, y = (torch.tensor([value], dtype=dtype) for value in (first, second))
        integer_kernel[(1,)](x, y, out, OPERATION=operation)

    run(fits)
    assert out.item() == function(first, fits)
    with pytest.raises(InterpreterError, match=f"overflow detected for operation {operation}"):
        run(overflows)
