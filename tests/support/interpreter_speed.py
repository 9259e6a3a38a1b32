"""Makes Triton's interpreter quicker, with the same results and the same checks.

Most of its time goes to types and shapes that it makes and compares again for each operation of each program, to constants,
and to a check of overflow that it interprets as seven more operations.
"""

from __future__ import annotations

import functools
import inspect
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
    call_builtins_directly()
    take_over_once()
    check_overflow_at_once()
    compare_names_of_types()
    keep_types_of_arrays()
    keep_shapes()
    keep_what_broadcasts_give()
    keep_what_operands_become()


def call_builtins_directly() -> None:
    """Not through a function that asks whether a kernel makes the call."""

    def patch(package, name, member, builder, scope):
        function = inspect.unwrap(member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(package, name, call)

    interpreter._patch_attr = patch


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


def compare_names_of_types() -> None:
    original, plain = tl.core._unwrap_if_constexpr, {tl.tensor, tl.dtype, int, float, bool, str}
    integers, floats = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES), frozenset(tl.dtype.FP_TYPES)

    def unwrap(value):
        return value if value.__class__ in plain else original(value)

    def equal(self, other):
        if self is other:
            return True
        other = unwrap(other)
        return isinstance(other, tl.dtype) and self.name == other.name

    tl.core._unwrap_if_constexpr = unwrap
    tl.dtype.__eq__ = equal
    tl.dtype.is_int = lambda self: self.name in integers
    tl.dtype.is_floating = lambda self: self.name in floats
    tl.dtype.to_ir = tl.block_type.to_ir = lambda self, builder: self


def keep_types_of_arrays() -> None:
    original, kept = interpreter._get_np_dtype, {}

    def of(dtype):
        scalar = dtype.scalar
        if scalar.name not in kept:
            kept[scalar.name] = original(scalar)
        return kept[scalar.name]

    def fits(array, dtype):
        return array.itemsize == 1 or dtype.is_ptr() or array.itemsize * 8 <= dtype.primitive_bitwidth

    interpreter._get_np_dtype, interpreter._validate_np_data_size = of, fits


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


def spread(semantic, tensor, type):
    """A tensor over a type of block; None: as it is."""
    if type is None:
        return tensor
    if tensor.type.is_block():
        return tl.tensor(semantic.builder.create_broadcast(tensor.handle, type.shape), type)
    return tl.tensor(semantic.builder.create_splat(type, tensor.handle), type)


def keep_what_broadcasts_give() -> None:
    original, kept = TritonSemantic.broadcast_impl_value, {}

    def broadcast(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        key = lhs.type.name, rhs.type.name
        if key not in kept:
            one, other = original(self, lhs, rhs)
            kept[key] = None if one is lhs else one.type, None if other is rhs else other.type
        one, other = kept[key]
        return spread(self, lhs, one), spread(self, rhs, other)

    TritonSemantic.broadcast_impl_value = broadcast


def keep_what_operands_become() -> None:
    """Types tell what operands are cast to and spread over, and what a constant becomes beside the other operand."""
    original, kept = TritonSemantic.binary_op_type_checking_impl, {}

    def told(operand):
        return operand.type.name if operand.__class__ is tl.tensor else (operand.__class__, repr(operand))

    def step(given, new):
        """None: it stays; a type: it becomes one of it; a tensor: this one."""
        if given.__class__ is not tl.tensor:
            return new
        return None if new is given else new.type

    def become(self, given, new):
        if new is None or new.__class__ is tl.tensor:
            return given if new is None else new
        cast = self.cast(given, new.scalar)
        return cast if cast.type.name == new.name else spread(self, cast, new)

    def operands(self, lhs, rhs, *options, **named):
        key = told(lhs), told(rhs), options, *named.items()
        if key in kept:
            one, other = kept[key]
            return become(self, lhs, one), become(self, rhs, other)
        one, other = original(self, lhs, rhs, *options, **named)
        kept[key] = step(lhs, one), step(rhs, other)
        return one, other

    TritonSemantic.binary_op_type_checking_impl = operands
