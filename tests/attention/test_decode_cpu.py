"""decode_attention's C++ kernel: the bits of a row, and what it reads."""

from __future__ import annotations

import pytest
import torch

from r1kernels import extension
from tests.support.decode_case import DecodeCase
from tests.support.numerics import same_bits
from tests.support.redzones import Redzones

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"window": 30, "softcap": 8.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(dtype):
    """Alone, among others, and with a text that is cut in other places."""
    shared = [([0] * 40, [17] * 40), ([b // 5 for b in range(40)], [b % 5 + 3 for b in range(40)])]
    many = DecodeCase([b % 23 for b in range(40)], shared, dtype=dtype, options=OPTIONS)
    found = many.run(backend="cpu")[0]
    for row in (0, 17, 39):
        alone = DecodeCase(
            [many.lengths[row]], [([0], [tokens[row]]) for _, tokens in shared], dtype=dtype, options=OPTIONS
        )
        here = slice(row, row + 1)
        alone.query, alone.key, alone.value = many.query[here], many.key[here], many.value[here]
        alone.cache = tuple(x[here] for x in many.cache)
        alone.shared = [
            tuple(x[nodes[row] : nodes[row] + 1] for x in pair)
            for (nodes, _), pair in zip(shared, many.shared, strict=True)
        ]
        assert same_bits(alone.run(backend="cpu")[0], found[here])
        keys, values = alone.text(0)
        whole = DecodeCase([keys.shape[1] - 1], dtype=dtype, options=OPTIONS)
        whole.query, whole.key, whole.value = alone.query, alone.key, alone.value
        whole.cache = keys[None].clone(), values[None].clone()
        assert same_bits(whole.run(backend="cpu")[0], found[here])


def test_threads_change_nothing():
    given = DecodeCase([200 + b for b in range(64)], [([0] * 64, [150] * 64)])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(given.run(backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1][0], results[1][1][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(6, 2, 16, 16), (2, 2, 5, 19)], ids=str)
def test_nothing_that_no_row_sees_is_read(dtype, sizes):
    """Arguments between NaN, and NaN behind every length, give the bits of plain arguments."""
    given = DecodeCase([0, 33, 2], [([0, 1, 0], [7, 21, 7])], sizes, dtype)
    expected = given.run(backend="cpu")[0]
    for keys, values in given.shared:
        for node, tokens in ((0, 7), (1, 21)):
            keys[node, :, tokens:], values[node, :, tokens:] = torch.nan, torch.nan
    for row, length in enumerate(given.lengths):
        given.cache[0][row, :, length:], given.cache[1][row, :, length:] = torch.nan, torch.nan
    zones = Redzones()
    given.query, given.key, given.value = (
        zones.input(x, offset=1) for x in (given.query, given.key, given.value)
    )
    given.shared = [tuple(zones.input(x, offset=1) for x in pair) for pair in given.shared]
    assert same_bits(given.run(backend="cpu")[0], expected)
    zones.check()


def test_a_score_that_is_no_number_shows_in_its_row_alone():
    given = DecodeCase([4, 4, 4], [([0] * 3, [5] * 3)])
    given.query[1, 0, 3] = torch.nan
    found = given.run(backend="cpu")[0]
    assert found[1, 0].isnan().all()
    found[1, 0] = 0
    assert found.isfinite().all()
