"""The CUDA kernels of token_logprobs, their real source and launchers, under the host emulator."""

import pytest
import torch

from tests.support.numerics import same_bits
from tests.support.token_logprobs_kernel import IGNORED, Call, TokenLogprobsKernel, random_case

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class EmulatedKernel:
    """The launchers of csrc/logprob/cuda.h on CPU tensors."""

    device = "cpu"

    def __init__(self, module, seed=0):
        self.module, self.seed = module, seed

    def call(self, logits, targets, temperatures, temperature, ignore_index):
        self.module.set_seed(self.seed)
        return self.module.Call(
            logits.data_ptr(),
            DTYPE_CODES[logits.dtype],
            *logits.shape,
            *logits.stride()[:2],
            address(targets),
            address(temperatures),
            temperature,
            ignore_index,
        )

    def forward_into(self, logits, targets, temperatures, temperature, ignore_index, logp, entropy, stats):
        call = self.call(logits, targets, temperatures, temperature, ignore_index)
        assert self.module.forward(call, address(logp), address(entropy), address(stats)) == 0

    def backward_into(
        self,
        grad,
        logits,
        targets,
        temperatures,
        temperature,
        ignore_index,
        logp,
        stats,
        grad_logp,
        grad_entropy,
    ):
        call = self.call(logits, targets, temperatures, temperature, ignore_index)
        rows = (address(tensor) for tensor in (logp, stats, grad_logp, grad_entropy))
        assert self.module.backward(call, *rows, grad.data_ptr(), *grad.stride()[:2]) == 0


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("token_logprobs")


@pytest.fixture
def kernel(module):
    return EmulatedKernel(module)


class TestTokenLogprobsCuda(TokenLogprobsKernel):
    pass


def test_no_order_of_threads_or_blocks_moves_a_bit(module):
    """A missing barrier or a race shows as a difference between two orders."""
    logits, targets, *grads = random_case(2, 3, 1111)
    first, *others = (
        Call(EmulatedKernel(module, seed), logits, targets, 0.8, grads=grads) for seed in range(6)
    )
    for other in others:
        for name in ("logp", "entropy", "stats", "grad"):
            assert same_bits(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize("seed", range(3))
def test_a_block_takes_several_rows(module, seed):
    """Past 2^31 - 1 rows a grid has fewer blocks than rows; here it has two for seven."""
    logits, targets, grad_logp, grad_entropy = random_case(1, 7, 600)
    targets[3] = IGNORED
    expected = Call(EmulatedKernel(module), logits, targets, grads=(grad_logp, grad_entropy))
    call = EmulatedKernel(module, seed).call(logits, targets, None, 1.0, IGNORED)
    outputs = (expected.logp, expected.entropy, expected.stats, expected.grad)
    logp, entropy, stats, grad = (torch.full_like(output, torch.nan) for output in outputs)
    module.forward_in_blocks(call, 2, *map(address, (logp, entropy, stats)))
    module.backward_in_blocks(call, 2, *map(address, (logp, stats, grad_logp, grad_entropy, grad)))
    assert same_bits(logp, expected.logp) and same_bits(entropy, expected.entropy)
    assert same_bits(stats, expected.stats) and same_bits(grad, expected.grad)


def test_an_unknown_dtype_is_an_error_code(module):
    call = module.Call(0, 7, 1, 1, 4, 4, 4, 0, 0, 1.0, -100)
    code = module.forward(call, 0, 0, 0)
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
