"""The CUDA kernels over completions, under the host emulator. B completions, N tokens."""

import itertools

import pytest
import torch

from tests.support.emulated_rows import address
from tests.support.numerics import same_bits
from tests.support.redzones import Redzones

BOUNDS = torch.tensor([0, 3, 3, 40, 41, 200, 333])


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("token_logprobs")


def sums(module, values, cu_seqlens, completions):
    zones = Redzones()
    out = zones.output(completions)
    bounds = None if cu_seqlens is None else zones.input(cu_seqlens)
    fenced = zones.input(values)
    assert (
        module.completion_sums(address(fenced), len(values), address(bounds), completions, address(out)) == 0
    )
    zones.check()
    return out


def numbers(module, cu_seqlens, tokens):
    zones = Redzones()
    out, bounds = zones.output(tokens, dtype=torch.int32), zones.input(cu_seqlens)
    code = module.completion_numbers(address(bounds), len(cu_seqlens) - 1, tokens, address(out))
    assert code == 0
    zones.check()
    return out


def test_sums_of_packed_completions(module):
    values = torch.randn(333)
    ours = sums(module, values, BOUNDS, 6)
    exact = torch.stack([values[a:b].double().sum() for a, b in itertools.pairwise(BOUNDS)])
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)
    assert ours[1] == 0


def test_sums_of_padded_completions(module):
    values = torch.randn(12, 70)
    ours = sums(module, values.flatten(), None, 12)
    torch.testing.assert_close(ours.double(), values.double().sum(-1), rtol=0, atol=1e-5)


def test_a_completion_has_the_same_bits_in_any_company(module):
    values = torch.randn(333)
    alone = sums(module, values[41:200].contiguous(), torch.tensor([0, 159]), 1)
    assert same_bits(sums(module, values, BOUNDS, 6)[4:5], alone)
    assert same_bits(sums(module, values[41:200].contiguous(), None, 1), alone)


@pytest.mark.parametrize("bounds", [[0, 5, 99], [-1, 5, 10], [0, 7, 5], [0, 2**62, 10]], ids=str)
def test_bounds_outside_are_nan_and_read_nothing(module, bounds):
    """On a GPU no one has looked at the bounds; what lies outside is NaN in the redzones, or crashes."""
    values = torch.ones(10)
    ours = sums(module, values, torch.tensor(bounds), 2)
    for i, sum_of_one in enumerate(ours.tolist()):
        valid = 0 <= bounds[i] <= bounds[i + 1] <= 10
        assert sum_of_one == bounds[i + 1] - bounds[i] if valid else sum_of_one != sum_of_one


def test_the_completion_of_each_token(module):
    expected = torch.repeat_interleave(torch.arange(6, dtype=torch.int32), BOUNDS.diff())
    assert torch.equal(numbers(module, BOUNDS, 333), expected)
    assert numbers(module, BOUNDS, 400)[333:].eq(-1).all()
    assert numbers(module, torch.tensor([0]), 5).eq(-1).all()
    assert numbers(module, torch.tensor([2, 4]), 5).tolist() == [-1, -1, 0, 0, -1]


@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257])
def test_any_number_of_tokens(module, tokens):
    bounds = torch.tensor([0, tokens // 2, tokens])
    expected = torch.repeat_interleave(torch.arange(2, dtype=torch.int32), bounds.diff())
    assert torch.equal(numbers(module, bounds, tokens), expected)
    assert sums(module, torch.ones(tokens), bounds, 2).tolist() == [tokens // 2, tokens - tokens // 2]
