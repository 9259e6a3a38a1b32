"""Makes Triton's interpreter quicker, with the same results and the same checks.

Most of its time goes to types and shapes that it makes again for each operation of each program, and to a check of
overflow that it interprets as seven more operations.
"""

from __future__ import annotations

import functools
import math
import operator
import types

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

EXACT = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def hasten() -> None:
    """Lasts as long as the process."""
    take_over_once()
    check_overflow_at_once()
    keep_types_of_arrays()
    keep_shapes()
    broadcast_nothing_that_fits()


def take_over_once() -> None:
    """The interpreter takes over triton.language for each call of each function otherwise."""
    everywhere = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(everywhere)
    interpreter._patch_lang = lambda function: types.SimpleNamespace(restore=lambda: None)


def check_overflow_at_once() -> None:
    def check(self, lhs, rhs, binary_op):
        dtype = lhs.type.scalar
        if dtype.int_bitwidth < 64 and self.builder.options.sanitize_overflow:
            name = binary_op.__name__
            exact = EXACT[name](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
            fits = (exact == exact.astype(interpreter._get_np_dtype(dtype))).all()
            assert fits, f"int{dtype.int_bitwidth} overflow detected for operation {name}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def keep_types_of_arrays() -> None:
    original, kept = interpreter._get_np_dtype, {}

    def of(dtype):
        scalar = dtype.scalar
        if scalar.name not in kept:
            kept[scalar.name] = original(scalar)
        return kept[scalar.name]

    interpreter._get_np_dtype = of


def keep_shapes() -> None:
    describe, kept = tl.block_type.__init__, {}

    def make_type(self, element_ty, shape):
        key = element_ty.name, tuple(tl.core._unwrap_if_constexpr(size) for size in shape)
        if key not in kept:
            describe(self, element_ty, list(key[1]))
            kept[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = kept[key]

    @functools.cache
    def shape_of(sizes):
        return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(tuple(type.shape.values) if type.is_block() else ())

    tl.block_type.__init__, tl.tensor.__init__ = make_type, make_tensor


def broadcast_nothing_that_fits() -> None:
    original = TritonSemantic.broadcast_impl_value

    def broadcast(self, lhs, rhs):
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return original(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast
