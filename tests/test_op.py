"""Argument lists as NamedTuples that hold one another."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor

from r1kernels.op import OUTSIDE, Fields


class Inner(NamedTuple):
    scale: float
    bias: Tensor | None


class Outer(NamedTuple):
    first: Tensor
    inner: Inner
    flag: bool


class Around(NamedTuple):
    outer: Outer
    last: Tensor


class Surrounded(NamedTuple):
    inner: Inner
    flag: bool
    around: Annotated[Inner | None, OUTSIDE] = None


class Twice(NamedTuple):
    scale: float
    inner: Inner


class Options(NamedTuple):
    scale: float = 1.0
    bias: Tensor | None = None


PLAIN = Options()


class Last(NamedTuple):
    first: Tensor
    options: Options = PLAIN
    around: Annotated[int, OUTSIDE] = 7


class NotLast(NamedTuple):
    options: Options = PLAIN
    flag: bool = False


def test_the_fields_of_a_call_in_a_row_and_back():
    fields = Fields(Around)
    assert list(fields.types) == ["first", "scale", "bias", "flag", "last"]
    first, last = torch.ones(2), torch.zeros(1)
    call = Around(Outer(first, Inner(0.5, None), True), last)
    row = tuple(fields.of(call))
    assert row[0] is first and row[1:4] == (0.5, None, True) and row[4] is last
    again = fields.back(row)
    assert again.outer.first is first and again.outer.inner == Inner(0.5, None) and again.last is last


def test_what_is_outside_of_kernels_is_in_no_row():
    fields = Fields(Surrounded)
    inner = Inner(0.5, None)
    assert list(fields.types) == ["scale", "bias", "flag"]
    row = fields.of(Surrounded(inner, True, around=inner))
    assert row == (0.5, None, True) and fields.back(row) == Surrounded(inner, True, None)


def test_a_name_stands_once_in_a_row():
    with pytest.raises(TypeError, match="Twice: expected names that occur once, got inner again"):
        Fields(Twice)


def test_the_last_fields_are_not_passed_where_they_are_their_defaults():
    fields = Fields(Last)
    assert fields.schema() == "Tensor first, float scale=1.0, Tensor? bias=None"
    first, bias = torch.ones(2), torch.zeros(2)
    assert fields.of(Last(first)) == (first,)
    row = fields.of(Last(first, Options(2.0, bias)))
    assert row[0] is first and row[1] == 2.0 and row[2] is bias
    # the dispatcher leaves the last defaults out, whoever passed them
    for given in ((first,), (first, 1.0), (first, 1.0, None)):
        again = fields.back(given)
        assert again.first is first and again[1:] == (Options(1.0, None), 7)


def test_what_can_be_left_out_stands_last():
    with pytest.raises(TypeError, match="NotLast: expected no field after options, which has a default"):
        Fields(NotLast)
