"""The CUDA kernels of token_logprobs, their real source and launchers, under the host emulator."""

import pytest
import torch

from r1kernels.logprob import reference
from r1kernels.logprob.token import RowsCall
from tests.support.emulated_rows import EmulatedKernel
from tests.support.numerics import same_bits
from tests.support.row_ops_kernel import RowCall, RowOpsKernel, rows_of
from tests.support.token_logprobs_kernel import DTYPES, IGNORED, Call, TokenLogprobsKernel, random_case


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("token_logprobs")


@pytest.fixture
def kernel(module):
    return EmulatedKernel(module)


@pytest.fixture
def long_row(module):
    """Three pieces, the last one short."""
    return 2 * module.PIECE + 37


class TestTokenLogprobsCuda(TokenLogprobsKernel):
    pass


class TestRowOpsCuda(RowOpsKernel):
    pass


def row_lengths(module):
    """One warp per row, one block per row, several blocks per row; none a multiple of anything."""
    return (module.WARP_ROW - 3, module.WARP_ROW + 701, module.PIECE + 1009)


@pytest.mark.parametrize("which", range(3))
def test_no_order_of_threads_or_blocks_moves_a_bit(module, which):
    """A missing barrier or a race shows as a difference between two orders."""
    logits, targets, *grads = random_case(1, 3, row_lengths(module)[which])
    first, *others = (
        Call(EmulatedKernel(module, seed), logits, targets, 0.8, grads=grads) for seed in range(4)
    )
    for other in others:
        for name in ("logp", "entropy", "stats", "grad"):
            assert same_bits(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_block_takes_several_rows(module, which, blocks):
    """A grid holds at most 2^31 - 1 blocks, and there may be more rows."""
    logits, targets, *grads = random_case(1, 5, row_lengths(module)[which], torch.bfloat16)
    targets[3] = IGNORED
    rows = rows_of(logits, targets)
    expected = RowCall(EmulatedKernel(module), logits, rows, extra=True, grads=grads)
    module.set_max_blocks(blocks)
    try:
        result = RowCall(EmulatedKernel(module, seed=blocks), logits, rows, extra=True, grads=grads)
    finally:
        module.set_max_blocks(2**32 - 1)
    for name in ("logp", "entropy", "stats", "extra", "grad"):
        assert same_bits(getattr(result, name), getattr(expected, name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_several_blocks_keeps_its_bits_at_any_address(module, dtype):
    """Every alignment of a row of any length: what a lane adds follows from the column alone."""
    for vocabulary in row_lengths(module):
        logits, targets, *_ = random_case(1, 1, vocabulary, dtype)
        first, *others = (
            Call(EmulatedKernel(module), logits, targets, offset=offset) for offset in (0, 1, 2, 3, 5)
        )
        for other in others:
            assert same_bits(first.logp, other.logp) and same_bits(first.entropy, other.entropy)


def test_more_pieces_than_a_warp_has_lanes(module):
    vocabulary = 33 * module.PIECE + 5
    logits, targets, *_ = random_case(1, 1, vocabulary, torch.bfloat16)
    logits[0, 0, 2 * module.PIECE] = logits.max() + 3
    call = Call(EmulatedKernel(module), logits, targets)
    rows = rows_of(logits, targets)
    logp, entropy, _ = reference.forward(RowsCall(logits.double(), rows, True, False))
    torch.testing.assert_close(call.logp.double(), logp, rtol=2e-6, atol=0)
    torch.testing.assert_close(call.entropy.double(), entropy, rtol=2e-6, atol=0)


def test_an_unknown_dtype_is_an_error_code(module):
    call = module.Call(0, 7, 1, 1, 4, 4, 4, 0, 0, 1.0, -100, 0, 1.0, 0.0, 0, 4)
    code = module.forward(call, False, 0, 0, 0, 0)
    assert module.error_text(code) == "invalid argument"


@pytest.mark.parametrize(
    ("round_trip", "dtype"), [("round_trip_half", torch.float16), ("round_trip_bfloat16", torch.bfloat16)]
)
def test_the_emulator_rounds_as_torch_does(module, round_trip, dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (4000,), generator=generator)
    values = torch.randn(4000, generator=generator) * 2.0**exponents
    halfway = torch.tensor(
        [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-25, 3 * 2.0**-25]
    )
    edges = torch.tensor(
        [0.0, -0.0, 65504.0, 65519.9, 65520.0, -65520.0, 1e38, torch.inf, -torch.inf, 2.0**-24]
    )
    values = torch.cat((values, halfway, -halfway, edges))
    ours = torch.tensor([getattr(module, round_trip)(float(value)) for value in values])
    assert same_bits(ours, values.to(dtype).float())
