"""linear_logprobs of the backend cuda without a GPU: its engine and its kernels under the emulator, torch's GEMM on the CPU.

torch has no product of 16-bit matrices with a float32 result on the CPU: the products here are of upcast inputs.
N tokens, H hidden, V vocabulary.
"""

import pytest
import torch

from r1kernels.logprob import cuda, gpu, ops, tiles
from tests.support import linear_oracle as oracle
from tests.support.emulated_rows import EmulatedKernel
from tests.support.numerics import CAP, same_bits

IGNORED = -100


def product(a, b, out, accumulate):
    assert a.dtype == b.dtype
    result = a.float() @ b.float()
    out.copy_(out + result if accumulate else result)


ENGINE = cuda.ENGINE._replace(
    logits=lambda hidden, weight, out: product(hidden, weight.t(), out, False),
    add_product=product,
    tokens=16,
    tile_bytes=16 * 4 * 256,
    invariant_tokens=lambda dtype: 8,
    invariant_columns=128,
)


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(emulated):
    """The row ops of the backend cuda take CPU tensors, by the emulator, while a test runs."""
    kernel = EmulatedKernel(emulated("token_logprobs"))

    def forward(logits, *arguments):
        *rows, entropy, extra = arguments
        rows, count = ops.Rows(*rows), logits.shape[1]
        whole = rows.vocabulary == logits.shape[2]
        outputs = [torch.full((count,), torch.nan) for _ in range(2)]
        stats, extras = torch.full((3, count), torch.nan), torch.full((3 if extra else 0, count), torch.nan)
        value = outputs[1] if entropy and whole else None
        kernel.rows_forward_into(logits, rows, entropy, outputs[0], value, stats, extras if extra else None)
        return outputs[0], torch.empty(0) if value is None else value, stats, extras

    def backward_(logits, *arguments):
        kernel.rows_backward_into(logits, logits, ops.Rows(*arguments[:9]), *arguments[9:])

    def backward_into(logits, *arguments):
        kernel.rows_backward_into(arguments[-1], logits, ops.Rows(*arguments[:9]), *arguments[9:-1])

    library = torch.library.Library("r1kernels", "IMPL")
    for name, function in (("", forward), ("_backward_", backward_), ("_backward_into", backward_into)):
        library.impl(f"token_logprobs_cuda{name}", function, "CPU")
    yield
    library._destroy()


class Case:
    def __init__(self, dtype, tokens=37, hidden=24, vocabulary=600):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, hidden, generator=generator).to(dtype)
        self.weight = (0.5 * torch.randn(vocabulary, hidden, generator=generator)).to(dtype)
        self.head = oracle.Head(torch.randn(vocabulary, generator=generator), 0.8, 9.0)
        self.targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        self.targets[3] = IGNORED
        self.grads = torch.randn(2, tokens, generator=generator)

    def problem(self, tokens=None, batch_invariant=False):
        rows = slice(0, tokens)
        head = (self.head.bias, self.head.logit_scale, self.head.softcap)
        call = ops.Rows(*head, self.targets[rows], None, 0.9, IGNORED, 0, len(self.weight))
        hidden = self.hidden[rows].contiguous()
        tiling = tiles.tiling_of(ENGINE, hidden, len(self.weight), 0, batch_invariant)
        return tiles.Problem(ENGINE, hidden, self.weight, call, tiling)

    def exact(self):
        """(values, gradients of hidden, weight and bias) in float64."""
        leaves = [tensor.double().requires_grad_() for tensor in (self.hidden, self.weight, self.head.bias)]
        head = self.head._replace(bias=leaves[2])
        values = oracle.of_logits(leaves[0] @ leaves[1].T, head, self.targets, 0.9)
        loss = (values[0] * self.grads[0] + values[1] * self.grads[1]).sum()
        return values, torch.autograd.grad(loss, leaves)


def assert_close(ours, exact, tolerance):
    assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tiles_give_the_whole(dtype, save):
    case = Case(dtype)
    (*values, is_top1), gradients = case.exact()
    problem = case.problem()
    assert len(problem.tiling.blocks(37)) > 1 and len(problem.tiling.slabs(600)) > 1
    saved = torch.full((37, 600), torch.nan) if save else None
    logp, entropy, stats, extra = tiles.forward(problem, True, True, saved)
    for ours, truth in zip((logp, entropy, *extra[:2]), values, strict=True):
        assert_close(ours.detach(), truth.detach(), 1e-5)
    assert torch.equal(extra[2] == 1, is_top1)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        kept = None if saved is None else saved.clone()
        ours = tiles.backward(problem, kept, logp, stats, *case.grads, None, needs)
        for mine, truth, needed in zip(ours, gradients, needs, strict=True):
            if needed:
                assert_close(mine, truth, 2 * CAP[dtype])
            else:
                assert mine.numel() == 0


def test_gradients_by_sequence():
    case = Case(torch.bfloat16)
    problem = case.problem()
    logp, _, stats, _ = tiles.forward(problem, True, False, None)
    sequences = (torch.arange(37) // 10).int()
    upstream = torch.randn(2, 4)
    needs = (True, True, False)
    looked_up = tiles.backward(problem, None, logp, stats, *upstream, sequences, needs)
    expanded = tiles.backward(problem, None, logp, stats, *upstream[:, sequences.long()], None, needs)
    assert all(same_bits(one, other) for one, other in zip(looked_up, expanded, strict=True))


def test_padded_tiles_give_a_token_the_same_bits_in_any_company():
    case = Case(torch.bfloat16)
    together = tiles.forward(case.problem(batch_invariant=True), True, False, None)
    alone = tiles.forward(case.problem(tokens=1, batch_invariant=True), True, False, None)
    assert same_bits(together[0][:1], alone[0]) and same_bits(together[1][:1], alone[1])


def test_rows_of_scratch_begin_on_cache_lines():
    for dtype, width in ((torch.float32, 1003), (torch.bfloat16, 1001), (torch.float16, 64)):
        scratch = tiles.scratch(ENGINE, torch.empty(0), 5, width, dtype)
        assert scratch.shape == (5, width) and scratch.dtype == dtype and scratch.stride(1) == 1
        assert scratch.stride(0) * dtype.itemsize % 128 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_are_calls_that_torch_has(dtype, accumulate):
    """On the meta device, where torch checks shapes and dtypes and computes nothing."""
    hidden, weight = (torch.empty(n, 24, dtype=dtype, device="meta") for n in (8, 40))
    out = torch.empty(8, 40, device="meta")
    if not accumulate:
        gpu.logits(hidden, weight, out)
    grad = torch.empty(8, 40, dtype=dtype, device="meta")
    gpu.add_product(grad, weight, torch.empty(8, 24, device="meta"), accumulate)
    gpu.add_product(grad.t(), hidden, torch.empty(40, 24, device="meta"), accumulate)
