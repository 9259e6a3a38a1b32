"""sample_tokens on every backend, against the quantiles of softmax in float64."""

from __future__ import annotations

import pytest
import torch

import r1kernels
from r1kernels import extension, sample_tokens
from tests.support.numerics import same_bits
from tests.support.redzones import Redzones

BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
    ),
]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(rows):
    return torch.linspace(0, 1, rows + 1, dtype=torch.float64)[:-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 5, 256, 259, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_tokens_are_quantiles_of_softmax(backend, dtype, vocabulary, temperature):
    logits = 3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    uniform = numbers(400)
    tokens, logp = sample_tokens(logits.expand(400, -1), uniform, temperature=temperature, backend=backend)
    exact = (logits[0].double() / temperature).log_softmax(-1)
    ends = torch.cat((torch.zeros(1, dtype=torch.float64), exact.exp().cumsum(-1)))
    assert ((ends[tokens] <= uniform + 1e-6) & (ends[tokens + 1] >= uniform - 1e-6)).all()
    assert tokens.dtype == torch.int64 and logp.dtype == torch.float64
    torch.testing.assert_close(logp, exact[tokens], rtol=1e-6, atol=1e-6)


def test_what_has_no_probability_is_not_drawn(backend):
    """At the edges, and where rounding lets the sums end early."""
    logits = torch.full((3, 600), -torch.inf)
    logits[:, [3, 255, 256, 590]] = torch.tensor([0.0, -1.0, 2.0, -200.0])
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, uniform, backend=backend)[0].tolist() == [3, 256, 256]


@pytest.mark.parametrize("logits", [[-9.0, 30.0, 29.0], [-0.5, -80.0, -90.0], [7.0]], ids=str)
def test_the_smallest_temperature_draws_the_most_probable(backend, logits):
    """Logits over the temperature are no floats."""
    tokens, logp = sample_tokens(
        torch.tensor([logits] * 3), numbers(3), temperature=torch.finfo(torch.float32).tiny, backend=backend
    )
    assert tokens.tolist() == [logits.index(max(logits))] * 3 and logp.tolist() == [0.0] * 3


def test_a_hopeless_row_is_hopeless_alone(backend):
    logits = torch.zeros(4, 300)
    logits[0, 7], logits[1, 299], logits[2] = torch.nan, torch.inf, -torch.inf
    tokens, logp = sample_tokens(logits, numbers(4), backend=backend)
    assert logp[:3].isnan().all() and ((tokens >= 0) & (tokens < 300)).all()
    assert tokens[3] == 225 and logp[3] == pytest.approx(-torch.tensor(300.0).log().item())


def test_a_row_has_the_same_bits_in_any_company(backend):
    logits = torch.randn(70, 999, generator=torch.Generator().manual_seed(0))
    tokens, logp = sample_tokens(logits, numbers(70), backend=backend)
    for row in (0, 13, 69):
        here = slice(row, row + 1)
        alone = sample_tokens(logits[here], numbers(70)[here], backend=backend)
        assert same_bits(alone[0], tokens[here]) and same_bits(alone[1], logp[here])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = sample_tokens(logits.repeat(9, 1), numbers(70).repeat(9), backend=backend)
    finally:
        torch.set_num_threads(before)
    assert same_bits(again[0], tokens.repeat(9)) and same_bits(again[1], logp.repeat(9))


def test_nothing_outside_the_arguments_is_read(backend):
    logits = torch.randn(3, 261, generator=torch.Generator().manual_seed(0))
    zones = Redzones()
    given = zones.input(logits, offset=1), zones.input(numbers(3))
    found, expected = (sample_tokens(*x, backend=backend) for x in (given, (logits, numbers(3))))
    assert same_bits(found[0], expected[0]) and same_bits(found[1], expected[1])
    zones.check()


def test_any_strides_and_no_rows(backend):
    logits = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).T
    found, expected = (sample_tokens(x, numbers(5), backend=backend) for x in (logits, logits.contiguous()))
    assert same_bits(found[0], expected[0]) and same_bits(found[1], expected[1])
    assert [x.shape for x in sample_tokens(logits[:0], numbers(0), backend=backend)] == [(0,), (0,)]


def test_float64_is_drawn_in_float64(backend):
    logits = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    below = torch.tensor([0.5 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, below)[0].tolist() == [0]
    assert sample_tokens(logits, below + 2**-53)[0].tolist() == [1]
    if backend == "cpu":
        with pytest.raises(r1kernels.BackendError, match="float64 is served by the reference alone"):
            sample_tokens(logits, below, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((torch.zeros(2, 3, 4), numbers(2)), {}, "logits: expected 2 dimensions"),
        ((torch.zeros(2, 0), numbers(2)), {}, "logits: expected shape .*, V at least 1"),
        ((torch.zeros(2, 3), numbers(3)), {}, "uniform: expected shape"),
        ((torch.zeros(2, 3), numbers(2).float()), {}, "uniform: expected dtype float64"),
        (
            (torch.zeros(2, 3), torch.tensor([0.5, 1.0]).double()),
            {},
            r"uniform: expected values in \[0, 1\), got 1.0 at position 1",
        ),
        ((torch.zeros(2, 3), torch.tensor([-0.5, 0.0]).double()), {}, "uniform: expected .*, got -0.5 at"),
        (
            (torch.zeros(2, 3), torch.tensor([0.0, torch.nan]).double()),
            {},
            "uniform: expected .*, got nan at",
        ),
        ((torch.zeros(2, 3), numbers(2)), {"temperature": 0}, "temperature: expected a number above 0"),
    ],
)
def test_a_wrong_argument_is_named(backend, arguments, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        sample_tokens(*arguments, backend=backend, **options)


def test_compiled(backend):
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    with r1kernels.use_backend(backend):
        found = torch.compile(sample_tokens, fullgraph=True, backend="aot_eager")(logits, numbers(6))
        expected = sample_tokens(logits, numbers(6))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
