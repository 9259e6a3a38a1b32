"""Repairs bfloat16 in Triton's interpreter, which computes with its raw bits and truncates where a GPU rounds.

``repair()`` makes casts, arithmetic, comparisons and dots go through float32, with round to nearest even on the way back,
so that a kernel written for a GPU runs unchanged. Call it in a process with TRITON_INTERPRET=1; it lasts as long as that.
It also makes the interpreter quicker, as interpreter_speed says.
"""

from __future__ import annotations

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from r1kernels import triton_interpreter
from tests.support import interpreter_speed

TensorHandle = interpreter.TensorHandle
BITS = np.dtype(np.uint16)  # of bfloat16


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, rounded to nearest even."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def is_bfloat16(operand: TensorHandle) -> bool:
    return operand.data.dtype == BITS and operand.dtype.scalar.name == tl.bfloat16.name


def widened(operand: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(operand.data), tl.float32) if is_bfloat16(operand) else operand


@functools.cache
def repair() -> None:
    builder = interpreter.InterpreterBuilder
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast_impl(self, source, to):
        if source.dtype.scalar == to.scalar:
            return TensorHandle(source.data, to.scalar)
        if source.dtype.scalar == tl.bfloat16:
            return cast(self, TensorHandle(widen(source.data), tl.float32), to)
        if to.scalar == tl.bfloat16:
            return TensorHandle(narrow(cast(self, source, tl.float32).data), tl.bfloat16)
        return cast(self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        if tl.bfloat16 in (source.dtype.scalar, to.scalar):
            return cast_impl(self, source, to)
        return convert(self, source, to, rounding)

    def through_float32(method, where):
        """The builder's method on float32 copies of bfloat16 operands; a float result is rounded back."""

        def wrapped(self, *arguments):
            *operands, op = arguments
            if op in where or not any([is_bfloat16(operand) for operand in operands]):
                return method(self, *arguments)
            result = method(self, *map(widened, operands), op).data
            return TensorHandle(narrow(result) if result.dtype == np.float32 else result, tl.bfloat16)

        return wrapped

    def create_dot(self, a, b, d, *options):
        return dot(self, widened(a), widened(b), d, *options)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
    builder.binary_op = through_float32(builder.binary_op, bitwise)
    builder.unary_op = through_float32(builder.unary_op, (np.invert,))
    builder.ternary_op = through_float32(builder.ternary_op, (np.where,))
    builder.create_dot = create_dot
    interpreter_speed.hasten()
    triton_interpreter.multiplies_bfloat16.cache_clear()
