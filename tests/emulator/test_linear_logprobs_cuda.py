"""linear_logprobs of the backend cuda without a GPU: its engine and its kernels under the emulator, torch's GEMM on the CPU.

torch has no product of 16-bit matrices with a float32 result on the CPU: the products here are of upcast inputs.
N tokens, H hidden, V vocabulary.
"""

import pytest
import torch

from r1kernels.logprob import columns, columns_head, columns_tiles, cuda, linear_tiles, tiles, token
from r1kernels.logprob.linear import LinearBackwardCall, LinearCall, SavedBackwardCall
from tests.support import linear_oracle as oracle
from tests.support.emulated_rows import ENGINE, EmulatedKernel
from tests.support.numerics import CAP, same_bits

IGNORED = -100


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(emulated):
    """The row ops of the backend cuda take CPU tensors, by the emulator, while a test runs."""
    kernel = EmulatedKernel(emulated("token_logprobs"))

    def forward(call):
        logits, rows, with_entropy, with_extra = call
        results = token.row_results(logits, logits.shape[1], logits.shape[2], rows, with_entropy, with_extra)
        for result in results:
            result.fill_(torch.nan)
        places = [result if result.numel() else None for result in results]
        kernel.rows_forward_into(logits, rows, with_entropy, *places)
        return results

    def backward(call):
        grad = torch.full_like(call.logits, torch.nan, memory_format=torch.contiguous_format)
        kernel.rows_backward_into(grad, call.logits, call.rows, *call.upstream)
        return grad

    def backward_over(call):
        kernel.rows_backward_into(call.logits, call.logits, call.rows, *call.upstream)

    def backward_into(call):
        kernel.rows_backward_into(call.grad, call.logits, call.rows, *call.upstream)

    library = torch.library.Library("r1kernels", "IMPL")
    for op, function in (
        (token.FORWARD, forward),
        (token.BACKWARD, backward),
        (token.BACKWARD_OVER, backward_over),
        (token.BACKWARD_INTO, backward_into),
    ):
        library.impl(op._names["cuda"], op._of_row(function), "CPU")
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

    def forward(self, tokens=None, save_logits=False, batch_invariant=False, extra=False):
        """(logp, entropy, stats, extra, logits) of the first tokens."""
        hidden, rows = self.hidden[:tokens].contiguous(), self.rows(tokens)
        call = LinearCall(hidden, self.weight, rows, True, extra, 0, save_logits, batch_invariant)
        return linear_tiles.forward(ENGINE, call)

    def rows(self, tokens=None):
        head = (self.head.bias, self.head.logit_scale, self.head.softcap)
        return token.Rows(*head, self.targets[:tokens], None, 0.9, IGNORED, 0, len(self.weight))

    def backward(self, upstream, needs, logits=None):
        """Gradients of hidden, weight and bias, from the logits of the forward or without."""
        call = LinearBackwardCall(self.hidden, self.weight, self.rows(), 0, token.Upstream(*upstream), *needs)
        if logits is None:
            return linear_tiles.backward(ENGINE, call)
        return linear_tiles.backward_of_saved(ENGINE, SavedBackwardCall(logits, call))

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
    tiling = tiles.tiling_of(ENGINE, case.hidden, 600, 0, False)
    assert len(tiling.blocks(37)) > 1 and len(tiling.slabs(600)) > 1
    logp, entropy, stats, extra, logits = case.forward(save_logits=save, extra=True)
    for ours, truth in zip((logp, entropy, *extra[:2]), values, strict=True):
        assert_close(ours.detach(), truth.detach(), 1e-5)
    assert torch.equal(extra[2] == 1, is_top1)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        ours = case.backward((logp, stats, *case.grads, None), needs, logits.clone() if save else None)
        for mine, truth, needed in zip(ours, gradients, needs, strict=True):
            if needed:
                assert_close(mine, truth, 2 * CAP[dtype])
            else:
                assert mine.numel() == 0


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ids_of_a_token_and_the_rest(dtype, save):
    """The logits of three ids per token, what the others sum up to, and gradients of both: of hidden states and of logits."""
    case = Case(dtype)
    ids = torch.stack([torch.randperm(600)[:3] for _ in case.targets])
    ids[1, 2], ids[3] = -1, -1
    listed = torch.zeros(37, 601, dtype=torch.bool).scatter(1, torch.where(ids < 0, 600, ids), True)[:, :600]
    leaves = [tensor.double().requires_grad_() for tensor in (case.hidden, case.weight, case.head.bias)]
    cap = 0.0 if save else 9.0  # capped logits are never saved
    raw = leaves[0] @ leaves[1].T + leaves[2]
    logits = 9 * torch.tanh(0.8 * raw / 9) if cap else 0.8 * raw
    rest = torch.where(listed, -torch.inf, logits / 0.9).logsumexp(1)
    counted, grads = torch.arange(37) != 3, case.grads.clone()
    of_columns = torch.randn(37, 3)
    loss = (raw.gather(1, ids.clamp(min=0)) * of_columns)[ids >= 0].sum() + (rest * grads[0])[counted].sum()
    exact = torch.autograd.grad(loss, leaves, retain_graph=True)

    rows = case.rows()._replace(softcap=cap)
    call = columns_head.HeadColumnsCall(case.hidden, case.weight, rows, ids, True, 0, save, False)
    found, stats, saved = columns_tiles.head_forward(ENGINE, call)
    assert_close(found[ids >= 0].detach(), raw.gather(1, ids.clamp(min=0))[ids >= 0].detach(), 1e-5)
    total = stats[0].double() / 0.9 + stats[1].double().log1p()
    assert_close(total[counted], rest[counted].detach(), 1e-6)
    upstream = (stats, of_columns, grads[0], None, True, True, True)
    backward = columns_head.HeadColumnsBackwardCall(case.hidden, case.weight, rows, ids, 0, *upstream)
    for ours, truth in zip(
        columns_tiles.head_backward(ENGINE, backward, saved if save else None), exact, strict=True
    ):
        assert_close(ours, truth, 2 * CAP[dtype])

    given = logits.detach().to(dtype).unsqueeze(0)
    leaf = given[0].double().requires_grad_()
    rest = torch.where(listed, -torch.inf, leaf / 0.9).logsumexp(1)
    loss = (leaf.gather(1, ids.clamp(min=0)) * of_columns)[ids >= 0].sum() + (rest * grads[0])[counted].sum()
    (truth,) = torch.autograd.grad(loss, leaf)
    found, stats = columns_tiles.forward(ENGINE, columns.ColumnsCall(given, ids, None, 0.9, True))
    assert torch.equal(found[ids >= 0], given[0].gather(1, ids.clamp(min=0))[ids >= 0].float())
    total = stats[0].double() / 0.9 + stats[1].double().log1p()
    assert_close(total[counted], rest[counted].detach(), 1e-6)
    call = columns.ColumnsBackwardCall(given, ids, None, 0.9, stats, of_columns, grads[0], None)
    assert_close(columns_tiles.backward(ENGINE, call)[0], truth, 2 * CAP[dtype])


def test_gradients_by_sequence():
    case = Case(torch.bfloat16)
    logp, _, stats, _, _ = case.forward()
    sequences = (torch.arange(37) // 10).int()
    grads = torch.randn(2, 4)
    needs = (True, True, False)
    looked_up = case.backward((logp, stats, *grads, sequences), needs)
    expanded = case.backward((logp, stats, *grads[:, sequences.long()].contiguous(), None), needs)
    assert all(same_bits(one, other) for one, other in zip(looked_up, expanded, strict=True))


def test_padded_tiles_give_a_token_the_same_bits_in_any_company():
    case = Case(torch.bfloat16)
    together = case.forward(batch_invariant=True)
    alone = case.forward(tokens=1, batch_invariant=True)
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
        cuda.logits(hidden, weight, out)
    grad = torch.empty(8, 40, dtype=dtype, device="meta")
    cuda.add_product(grad, weight, torch.empty(8, 24, device="meta"), accumulate)
    cuda.add_product(grad.t(), hidden, torch.empty(40, 24, device="meta"), accumulate)
