"""token_logprobs on a GPU: both backends, and what only a GPU can show (streams, graphs, syncs, sizes).

Written for hardware that most machines lack: `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

import r1kernels
from r1kernels import token_logprobs
from r1kernels.logprob.token import plain_rows
from tests.support.gpu_streams import on_a_side_stream, without_waiting
from tests.support.numerics import same_bits
from tests.support.row_kernels import backward, backward_over, forward
from tests.support.row_ops_kernel import RowOpsKernel
from tests.support.token_logprobs_kernel import IGNORED, TokenLogprobsKernel, random_case

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)


class OpKernel:
    """The torch ops of a backend; what they return is copied to where the caller wants it."""

    device = "cuda"

    def __init__(self, backend):
        self.backend = backend

    def rows_forward_into(self, logits, rows, with_entropy, logp, entropy, stats, extra):
        results = forward(self.backend, logits, rows, with_entropy, extra is not None)
        for place, result in zip((logp, entropy, stats, extra), results, strict=True):
            if place is not None:
                place.copy_(result)

    def rows_backward_into(self, grad, logits, rows, *saved):
        if grad is logits:
            backward_over(self.backend, logits, rows, *saved)
        else:
            grad.copy_(backward(self.backend, logits, rows, *saved))

    def forward_into(self, logits, targets, temperatures, temperature, ignore_index, logp, entropy, stats):
        rows = plain_rows(logits, targets, temperatures, temperature, ignore_index)
        self.rows_forward_into(logits, rows, entropy is not None, logp, entropy, stats, None)

    def backward_into(self, grad, logits, targets, temperatures, temperature, ignore_index, *saved):
        rows = plain_rows(logits, targets, temperatures, temperature, ignore_index)
        self.rows_backward_into(grad, logits, rows, *saved)


@pytest.fixture
def kernel(backend):
    return OpKernel(backend)


class TestTokenLogprobsOnGpu(TokenLogprobsKernel):
    pass


class TestRowOpsOnGpu(RowOpsKernel):
    @pytest.fixture
    def long_row(self):
        return 3 * 2**15 + 5


def loss_and_gradient(logits, targets, backend, **options):
    logp, entropy = token_logprobs(
        logits, targets, temperature=0.8, return_entropy=True, backend=backend, **options
    )
    loss = (logp + 0.1 * entropy).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return logp.detach(), gradient


def gpu_case(tokens, vocabulary, dtype=torch.bfloat16):
    logits, targets, *_ = random_case(1, tokens, vocabulary, dtype)
    return logits[0].cuda(), targets.cuda()


def test_a_kernel_serves_gpu_tensors_without_being_asked():
    logits, targets = gpu_case(4, 100)
    logp = token_logprobs(logits, targets)
    with r1kernels.use_backend("reference"):
        torch.testing.assert_close(logp, token_logprobs(logits, targets), rtol=1e-5, atol=1e-5)
    with pytest.raises(r1kernels.BackendError, match="logits: on cuda"):
        token_logprobs(logits, targets, backend="cpu")


def test_a_side_stream_is_respected(backend):
    source, targets = gpu_case(64, 5000)
    source.requires_grad_()
    expected, _ = loss_and_gradient(source, targets, backend)
    logp, gradient = on_a_side_stream(source, lambda late: loss_and_gradient(late, targets, backend))
    assert same_bits(logp.cpu(), expected.cpu())
    assert gradient.isfinite().all()


def test_a_graph_captures_and_replays(backend):
    source, targets = gpu_case(32, 3000)
    logits = source.clone().requires_grad_()
    loss_and_gradient(logits, targets, backend)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logp, gradient = loss_and_gradient(logits, targets, backend)
    for factor in (1.0, -0.5):
        with torch.no_grad():
            logits.copy_(source * factor)
        graph.replay()
        fresh = loss_and_gradient((source * factor).requires_grad_(), targets, backend)
        assert same_bits(logp.cpu(), fresh[0].cpu()) and same_bits(gradient.cpu(), fresh[1].cpu())


def test_nothing_waits_for_the_gpu(backend):
    logits, targets = gpu_case(32, 3000)
    logits.requires_grad_()
    loss_and_gradient(logits, targets, backend)
    with without_waiting():
        loss_and_gradient(logits, targets, backend)
        loss_and_gradient(logits[:, :-1], targets.clamp(max=2998), backend)
        loss_and_gradient(logits * 2, targets, backend, inplace_backward=True)


def test_a_target_out_of_range_is_nan_or_an_error_on_request(backend):
    logits, targets = gpu_case(3, 50)
    targets[1] = 50
    logp = token_logprobs(logits, targets, backend=backend)
    assert logp.isnan().tolist() == [False, True, False]
    r1kernels.debug_checks(True)
    try:
        with pytest.raises(IndexError, match="targets"):
            token_logprobs(logits, targets, backend=backend)
    finally:
        r1kernels.debug_checks(False)


def test_more_rows_than_the_second_dimension_of_a_grid_has(backend):
    logits, targets = gpu_case(70_001, 8, torch.float32)
    with r1kernels.use_backend("reference"):
        expected = token_logprobs(logits, targets)
    torch.testing.assert_close(
        token_logprobs(logits, targets, backend=backend), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.large
def test_more_than_2_to_the_31_elements(backend):
    """The last rows, whose offsets pass 2^31, have the bits that they have alone, and so has their gradient."""
    vocabulary, rows = 2**17 + 8, 2**14 + 3
    last, targets = gpu_case(3, vocabulary)
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = last
    all_targets = torch.full((rows,), IGNORED, device="cuda")
    all_targets[-3:] = targets
    leaf = torch.zeros((), dtype=torch.bfloat16, device="cuda", requires_grad=True)

    def run(z, y):
        """In place, so that the gradient needs no memory of its own; the leaf makes the logits require it."""
        z = z.add_(leaf)
        logp = token_logprobs(z, y, backend=backend, inplace_backward=True)
        logp.sum().backward()
        return logp.detach(), z.detach()

    alone, alone_gradient = run(last.clone(), targets)
    logp, gradient = run(logits, all_targets)
    assert same_bits(logp[-3:].cpu(), alone.cpu())
    assert same_bits(gradient[-3:].cpu(), alone_gradient.cpu())
    assert (logp[:-3] == 0).all() and (gradient[:1000] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_call_has_the_same_bits(backend, dtype):
    logits, targets = gpu_case(16, 1003, dtype)
    logits.requires_grad_()
    compiled = torch.compile(loss_and_logp, fullgraph=True)
    expected, result = (function(logits, targets, backend) for function in (loss_and_logp, compiled))
    assert same_bits(result[1].detach().cpu(), expected[1].detach().cpu())
    gradients = [torch.autograd.grad(loss, logits)[0].cpu() for loss, _ in (expected, result)]
    assert same_bits(*gradients)


def loss_and_logp(logits, targets, backend):
    logp = token_logprobs(logits, targets, temperature=0.8, backend=backend)
    return logp.sum(), logp
