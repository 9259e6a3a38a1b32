"""What does not count costs grpo_loss on the CPU nothing and changes nothing: runs of zeros of any length and place."""

from __future__ import annotations

import pytest
import torch

from r1kernels import extension
from tests.support.grpo_loss_kernel import check, gradients, on_backend
from tests.support.numerics import same_bits

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

LANES = 16  # of the widest vectors
WIDTHS = (1, LANES - 1, LANES, LANES + 1, 5 * LANES + 3, 4096 + LANES + 5)
"""Less than, exactly and more than whole vectors; the last one is more than an item (csrc/grpo/cpu.h)."""
MASKS = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64)


def runs(width, *lengths):
    """A row of ones and zeros in turn, in runs of these lengths, again and again."""
    row = torch.cat([torch.full((length,), 1 - k % 2) for k, length in enumerate(lengths)])
    return row.repeat(-(-width // len(row)))[:width]


def masks_of(width):
    """Rows that count up to a place, from a place on, in runs across the borders of vectors, and not at all."""
    places = torch.arange(width)
    return torch.stack(
        [
            places < width // 2 + 1,
            places >= width // 3,
            runs(width, 3, LANES - 3) == 1,
            runs(width, LANES, LANES) == 1,
            runs(width, 1, 2 * LANES + 5, LANES + 1, 3) == 1,
            places < 0,
            places == width - 1,
        ]
    )


def call_of(mask, seed=0, garbage=torch.nan):
    """(arguments, keywords) of a call with garbage wherever the mask is 0."""
    generator = torch.Generator().manual_seed(seed)

    def values(scale):
        return torch.where(mask != 0, scale * torch.randn(mask.shape, generator=generator), garbage)

    old = -values(1.0).abs()
    arguments = (old + values(0.3), old, values(1.0), mask)
    return arguments, {
        "ref_logp": old + values(0.3),
        "kl_coef": 0.2,
        "entropy": values(1.0).abs(),
        "entropy_coef": 0.1,
        "policy_weights": values(1.0).abs(),
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_runs_of_zeros(width, dtype):
    # 256: a mask of which the lowest byte is 0
    mask = masks_of(width).to(dtype) * (1 if dtype in (torch.bool, torch.uint8) else 256)
    arguments, keywords = call_of(mask if dtype != torch.bool else mask.bool())
    for changes in (
        {},
        {"ratio": "sequence"},
        {"variant": "vespo"},
        {"variant": "gmpo", "reduction": "token"},
    ):
        check("cpu", arguments, keywords | changes)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("more", [1, LANES, 3 * LANES + 7])
def test_more_padding_moves_no_bit(ratio, more):
    arguments, keywords = call_of(masks_of(5 * LANES + 3))
    keywords["ratio"] = ratio

    def padded(values, garbage):
        return torch.nn.functional.pad(values, (0, more), value=garbage)

    wide = [padded(value, torch.inf) for value in arguments[:3]] + [padded(arguments[3], False)]
    wide_keywords = {
        name: padded(value, -torch.inf) if torch.is_tensor(value) else value
        for name, value in keywords.items()
    }
    one, grads = gradients(lambda *v, **o: on_backend("cpu", *v, **o), arguments, keywords)
    other, wide_grads = gradients(lambda *v, **o: on_backend("cpu", *v, **o), wide, wide_keywords)
    assert same_bits(one.metrics.tensor, other.metrics.tensor)
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        assert same_bits(grad, wide_grad[:, :-more].contiguous())
        assert not wide_grad[:, -more:].any()
