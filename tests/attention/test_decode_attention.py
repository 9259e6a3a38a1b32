"""decode_attention on every backend, against attention in float64 over the text of each row."""

from __future__ import annotations

import pytest
import torch

from r1kernels import BackendError, DecodeLayout, SharedPrefix, decode_attention
from tests.support.decode_case import DecodeCase
from tests.support.numerics import assert_as_exact_as, same_bits

pytestmark = pytest.mark.usefixtures("backend")

SINKS = torch.tensor([0.5, -3.0, 4.0, 0.0, 1.0, -1.0])
HEAD, PROMPTS = ([0, 0, 0, 0, 0], [19] * 5), ([2, 0, 2, 0, 2], [3, 40, 3, 40, 3])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(**options):
    return DecodeCase([0, 33, 2, 16, 7], [HEAD, PROMPTS], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(6, 2, 16, 16), (6, 6, 20, 7), (6, 1, 33, 130), (6, 3, 3, 64)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 18}, {"window": 1}, {"softcap": 2.0, "scale": 0.7}, {"sinks": SINKS, "window": 50}],
    ids=str,
)
def test_it_is_as_exact_as_eager_attention_over_each_text(dtype, sizes, options):
    given = case(sizes=sizes, dtype=dtype, options=options)
    found, (keys, values) = given.run()
    assert_as_exact_as(found, given.eager(dtype), given.eager(torch.float64), dtype)
    for row, length in enumerate(given.lengths):
        given.cache[0][row, :, length], given.cache[1][row, :, length] = given.key[row], given.value[row]
    # the new tokens are in their places, and nothing else has changed
    assert same_bits(keys, given.cache[0]) and same_bits(values, given.cache[1])


def test_float64():
    given = case(dtype=torch.float64, options={"softcap": 5.0, "sinks": SINKS.double()})
    torch.testing.assert_close(given.run()[0], given.eager(torch.float64))


def test_keys_and_values_in_any_layout(backend):
    plain, strided = case(), case()
    strided.query = plain.query.transpose(0, 1).contiguous().transpose(0, 1)
    strided.key = torch.cat((plain.key, plain.value), -1)[..., :16]
    strided.value = plain.value.transpose(1, 2).contiguous().transpose(1, 2)
    strided.shared = [
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in pair) for pair in plain.shared
    ]
    strided.cache = tuple(torch.cat((x, x), 2)[:, :, : x.shape[2]] for x in plain.cache)
    found, expected = strided.run()[0], plain.run()[0]
    assert same_bits(found, expected) if backend == "cpu" else torch.allclose(found, expected, atol=1e-6)


def test_scores_of_any_size():
    """The largest score is subtracted before anything is raised."""
    given = case()
    given.query *= 1e4
    assert_as_exact_as(given.run()[0], given.eager(torch.float32), given.eager(torch.float64), torch.float32)


def test_no_row_has_a_result():
    layout = DecodeLayout(torch.zeros(0, dtype=torch.int64), 0, [SharedPrefix.of([], [])])
    empty = torch.zeros(0, 2, 4)
    nodes = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    assert decode_attention(empty, empty, empty, nodes, layout, [nodes]).shape == (0, 2, 4)


def test_autocast_casts_what_a_row_brings():
    given, low = case(), case(dtype=torch.bfloat16)
    given.cache, given.shared = low.cache, low.shared
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(given.run()[0], low.run()[0])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("query", torch.zeros(5, 5, 16), "query: expected a multiple of 2 heads, got 5"),
        ("query", torch.zeros(5, 6, 16, dtype=torch.int64), "query: expected dtype"),
        ("key", torch.zeros(5, 2, 8), r"key: expected shape \(5, any, 16\)"),
        ("value", torch.zeros(4, 2, 16), r"value: expected shape \(5, 2, any\)"),
        ("cache", (torch.zeros(4, 2, 36, 16),) * 2, "cache: expected at least 5 nodes of 34 tokens"),
        ("cache", (torch.zeros(5, 2, 30, 16),) * 2, "cache: expected at least 5 nodes of 34 tokens"),
        ("cache", (torch.zeros(5, 2, 36, 16).half(),) * 2, "cache: expected dtype float32"),
        ("shared", [], "prefixes: expected 2, as layout has, got 0"),
        ("shared", torch.zeros(2), "prefixes: expected a sequence of pairs, got Tensor"),
        (
            "shared",
            [(torch.zeros(1, 2, 19, 16),) * 2] * 2,
            "prefixes: expected at least 3 nodes of 40 tokens",
        ),
        ("options", {"window": 0}, "window: expected at least 1, got 0"),
        ("options", {"softcap": 0.0}, "softcap: expected a number above 0"),
        ("options", {"sinks": torch.zeros(2)}, r"sinks: expected shape \(6\)"),
    ],
)
def test_a_wrong_argument_is_named(name, value, error):
    given = case()
    setattr(given, name, value)
    with pytest.raises((TypeError, ValueError), match=error):
        given.run()


def test_a_cache_that_is_no_pair_or_has_other_strides_is_named(backend):
    given = case()
    states = (given.query, given.key, given.value)
    with pytest.raises(TypeError, match="cache: expected a pair of keys and values, got Tensor"):
        decode_attention(*states, given.cache[0], given.layout(), given.shared)
    if backend == "cpu":
        transposed = [cache.mT.contiguous().mT for cache in given.cache]
        with pytest.raises(ValueError, match="cache: expected the last dimension contiguous, got strides"):
            decode_attention(*states, transposed, given.layout(), given.shared)


@pytest.mark.parametrize("which", [0, 1])
def test_a_cache_whose_rows_would_overwrite_one_another_is_refused(which):
    given = case()
    cache = [x.clone() for x in given.cache]
    cache[which] = cache[which][:1].expand(6, -1, -1, -1)
    before = cache[which].clone()
    states = (given.query, given.key, given.value)
    with pytest.raises(ValueError, match=r"cache: expected entries that do not overlap, got strides \(0, "):
        decode_attention(*states, tuple(cache), given.layout(), given.shared)
    assert same_bits(cache[which], before)


@pytest.mark.parametrize("length", [34, -1])
def test_a_length_without_room_is_named_and_nothing_is_written(length):
    given = case()
    before = given.cache[0].clone()
    layout = DecodeLayout(torch.tensor([0, 33, length, 16, 7]), 33, given.layout().prefixes)
    keys = given.cache[0][:, :, :34]
    with pytest.raises(
        IndexError, match=rf"layout.lengths: expected values in \[0, 34\), got {length} at position 2"
    ):
        decode_attention(
            given.query, given.key, given.value, (keys, given.cache[1][:, :, :34]), layout, given.shared
        )
    assert same_bits(given.cache[0], before)


def test_bad_prefixes_are_named():
    with pytest.raises(ValueError, match="lengths: expected one for each of 2 rows, got 1"):
        SharedPrefix.of([0, 0], [1])
    with pytest.raises(ValueError, match="expected numbers of at least 0"):
        SharedPrefix.of([0, -1], [1, 1])
    with pytest.raises(ValueError, match=r"prefixes: expected shape \(1\)"):
        DecodeLayout(torch.tensor([1]), 1, [SharedPrefix.of([0, 0], [1, 1])])


@pytest.mark.parametrize(
    "of",
    [
        lambda given: given.query,
        lambda given: given.cache[1],
        lambda given: given.shared[1][0],
        lambda given: given.options["sinks"],
    ],
    ids=["query", "cache", "prefix", "sinks"],
)
def test_a_gradient_is_refused(of):
    given = case(options={"sinks": SINKS.clone()})
    of(given).requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        given.run()
    with torch.no_grad():
        assert not given.run()[0].requires_grad


def test_a_backend_that_cannot_says_why():
    with pytest.raises(ValueError, match="triton"):
        case().run(backend="triton")
    with pytest.raises(BackendError, match="value: of another dtype than query"):
        mixed = case()
        mixed.value, mixed.cache = mixed.value.half(), (mixed.cache[0], mixed.cache[1].half())
        mixed.shared = [(keys, values.half()) for keys, values in mixed.shared]
        mixed.run(backend="cpu")


def test_compiled(backend):
    given = case()
    layout = given.layout()

    def step(query, keys, values):
        return decode_attention(query, given.key, given.value, (keys, values), layout, given.shared)

    expected, written = given.run()
    keys, values = given.cache[0].clone(), given.cache[1].clone()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(given.query, keys, values)
    torch.testing.assert_close(found, expected)
    assert same_bits(keys, written[0]) and same_bits(values, written[1])
