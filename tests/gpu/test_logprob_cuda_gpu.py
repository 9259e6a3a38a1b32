"""The CUDA kernels of the log-prob ops on a GPU: every contract of the row ops, linear_logprobs and the grouped ops.

Written for hardware that most machines lack: `pytest -m gpu`. N tokens, H hidden, V vocabulary, B completions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from r1kernels import (
    extension,
    grouped_logprobs,
    linear_grouped_logprobs,
    linear_logprobs,
    token_logprobs,
)
from tests.support.gpu_streams import on_a_side_stream, without_waiting
from tests.support.logprob_rows import LogprobRows
from tests.support.numerics import same_bits
from tests.support.row_kernels import backward, backward_over, forward
from tests.support.row_ops_kernel import RowCall, RowOpsKernel, rows_of
from tests.support.token_logprobs_kernel import IGNORED, random_case

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
if extension.cuda_missing():
    pytest.skip(str(extension.cuda_missing()), allow_module_level=True)

OPTIONS = {"temperature": 0.8, "softcap": 30.0, "logit_scale": 0.9, "return_entropy": True, "backend": "cuda"}


class CudaKernel:
    """The torch ops; what they return is copied to where the caller wants it."""

    device = "cuda"

    def rows_forward_into(self, logits, rows, with_entropy, *places):
        results = forward("cuda", logits, rows, with_entropy, extra=places[3] is not None)
        for place, result in zip(places, results, strict=True):
            if place is not None:
                place.copy_(result)

    def rows_backward_into(self, grad, logits, rows, *saved):
        if grad is logits:
            backward_over("cuda", logits, rows, *saved)
        else:
            grad.copy_(backward("cuda", logits, rows, *saved))


@pytest.fixture
def kernel():
    return CudaKernel()


@pytest.fixture
def long_row():
    return 151_665


class TestRowOpsOnGpu(RowOpsKernel):
    pass


class TestRowsOnGpu(LogprobRows):
    device = "cuda"

    @pytest.fixture
    def backend(self):
        return "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1003, 32_003, 151_665])
def test_a_row_keeps_its_bits_in_any_company(kernel, vocabulary, dtype):
    logits, targets, *grads = random_case(1, 300, vocabulary, dtype)
    together = RowCall(kernel, logits, rows_of(logits, targets), grads=grads)
    for row in (0, 17, 299):
        one = slice(row, row + 1)
        call = (logits[:, one].contiguous(), rows_of(logits, targets[one]))
        alone = RowCall(kernel, *call, grads=tuple(grad[one] for grad in grads))
        assert same_bits(together.logp[one], alone.logp) and same_bits(together.grad[:, one], alone.grad)
        assert same_bits(together.entropy[one], alone.entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_gradient_of_float32_logits(dtype):
    """The same numbers as in float32, rounded once; rows of any alignment."""
    for vocabulary in (1003, 40_000):
        logits, targets, *grads = (tensor.cuda() for tensor in random_case(1, 5, vocabulary))
        rows = rows_of(logits, targets)
        logp, _, stats, _ = forward("cuda", logits, rows, True)
        wide = backward("cuda", logits, rows, logp, stats, *grads)
        narrow = torch.full((1, 5, vocabulary), torch.nan, dtype=dtype, device="cuda")
        torch.ops.r1kernels.token_logprobs_cuda_backward_into(
            logits, *rows, logp, stats, *grads, None, narrow
        )
        assert same_bits(narrow, wide.to(dtype))


def head(tokens, hidden, vocabulary, dtype=torch.bfloat16):
    """(hidden, weight, targets) on the GPU, with gradients."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator, device="cuda").to(dtype)
    w = (torch.randn(vocabulary, hidden, generator=generator, device="cuda") / hidden**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device="cuda")
    return x.requires_grad_(), w.requires_grad_(), targets


def linear_step(x, w, targets, **options):
    logp, entropy = linear_logprobs(x, w, targets, **OPTIONS | options)
    gradients = torch.autograd.grad((logp + 0.1 * entropy).sum(), (x, w))
    return logp.detach(), entropy.detach(), *gradients


def grouped_step(x, w, targets, **options):
    bounds = torch.arange(0, len(targets) + 1, len(targets) // 4, device="cuda")
    result = linear_grouped_logprobs(
        x, w, targets, cu_seqlens=bounds, group_size=2, reduce="mean", backend="cuda", **options
    )
    return result.logp.detach(), *torch.autograd.grad(result.logp.square().sum(), (x, w))


STEPS = pytest.mark.parametrize("step", [linear_step, grouped_step])


@STEPS
@pytest.mark.parametrize("save_logits", [False, True])
def test_nothing_waits_for_the_gpu(step, save_logits):
    case = head(4096, 64, 70_000)
    step(*case, save_logits=save_logits)
    with without_waiting():
        step(*case, save_logits=save_logits)


@STEPS
def test_a_graph_captures_and_replays(step):
    x, w, targets = head(256, 64, 5000)
    step(x, w, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, w, targets)
    with torch.no_grad():
        x.mul_(-0.5)
    graph.replay()
    assert all(same_bits(one, fresh) for one, fresh in zip(captured, step(x, w, targets), strict=True))


@STEPS
def test_a_side_stream_is_respected(step):
    x, w, targets = head(256, 64, 5000)
    expected = step(x, w, targets)
    results = on_a_side_stream(x, lambda late: step(late, w, targets))
    assert all(same_bits(one, other) for one, other in zip(results, expected, strict=True))


@STEPS
def test_two_runs_agree_bit_for_bit(step):
    case = head(3000, 128, 33_001)
    assert all(same_bits(one, other) for one, other in zip(step(*case), step(*case), strict=True))


def test_batch_invariant_tiles_keep_the_bits_of_a_token():
    x, w, targets = head(2500, 256, 33_001)
    options = OPTIONS | {"batch_invariant": True}
    with torch.no_grad():
        together = linear_logprobs(x, w, targets, **options)
        order = torch.randperm(2500, device="cuda")
        shuffled = linear_logprobs(x[order], w, targets[order], **options)
        for one, other in zip(together, shuffled, strict=True):
            assert same_bits(one[order], other)
        for tokens in (1, 7, 1025):
            few = linear_logprobs(x[:tokens], w, targets[:tokens], **options)
            assert all(same_bits(one[:tokens], other) for one, other in zip(together, few, strict=True))


@pytest.mark.large
def test_the_logits_are_not_kept_all_at_once():
    """Extra memory is one tile, its narrower gradient and one float32 accumulator, well under the (N, V) logits."""
    x, w, targets = head(16_384, 512, 151_936)
    everything = 4 * 16_384 * 151_936
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_step(x, w, targets, save_logits=False)
    assert torch.cuda.max_memory_allocated() - before < everything / 4


@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
def test_padded_and_packed_completions_agree(reduce):
    logits, targets, *_ = random_case(8, 50, 1003, torch.bfloat16)
    logits, targets = logits.cuda(), targets.view(8, 50).cuda()
    bounds = torch.arange(0, 401, 50, device="cuda")
    options = {"group_size": 4, "reduce": reduce, "return_entropy": True, "backend": "cuda"}
    padded = grouped_logprobs(logits, targets, **options)
    packed = grouped_logprobs(logits.flatten(0, 1), targets.flatten(), cu_seqlens=bounds, **options)
    for one, other in zip(padded, packed, strict=True):
        assert same_bits(one.flatten(), other.flatten())


def test_bounds_that_nobody_checked_reach_nothing_outside():
    logits = torch.randn(10, 30, device="cuda", requires_grad=True)
    targets = torch.zeros(10, dtype=torch.int64, device="cuda")
    bounds = torch.tensor([0, 4, 2**40], device="cuda")
    result = grouped_logprobs(logits, targets, cu_seqlens=bounds, group_size=1, backend="cuda")
    assert result.logp.isnan().flatten().tolist() == [False, True]
    result.logp.sum().backward()
    assert logits.grad[:4].isfinite().all()


@pytest.mark.large
def test_offsets_and_rows_past_2_to_the_31_elements():
    """The last row begins past 2^31 elements; one row alone passes 2^31."""
    rows, vocabulary = 14_200, 151_665
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(vocabulary, device="cuda").bfloat16()
    logits[-1] = last
    targets = torch.full((rows,), IGNORED, device="cuda")
    targets[-1] = 151_664
    logp = token_logprobs(logits, targets, backend="cuda")
    alone = token_logprobs(last[None], targets[-1:], backend="cuda")
    assert same_bits(logp[-1:], alone) and (logp[:-1] == 0).all()
    del logits
    row = torch.zeros(1, 2**31 + 77, dtype=torch.bfloat16, device="cuda")
    target = torch.tensor([2**31 + 76], device="cuda")
    row[0, -1] = 21.5
    logp, entropy = token_logprobs(row, target, return_entropy=True, backend="cuda")
    rest = torch.tensor(2**31 + 76, dtype=torch.float64) * torch.exp(torch.tensor(-21.5, dtype=torch.float64))
    torch.testing.assert_close(logp.cpu().double(), -torch.log1p(rest)[None], rtol=1e-4, atol=0)
    assert entropy.isfinite().all()


SMALL = """
import torch
from r1kernels import grouped_logprobs, linear_logprobs, token_logprobs
for dtype in (torch.float32, torch.bfloat16):
    for vocabulary in (37, 3001, 40009):
        logits = torch.randn(2, 3, vocabulary, device="cuda").to(dtype)[:, :, 1:].requires_grad_()
        targets = torch.tensor([[0, 5, -100], [10**6, 3, 4]], device="cuda")
        logp, entropy = token_logprobs(logits, targets, return_entropy=True, backend="cuda")
        (logp + entropy).nansum().backward()
x, w = (torch.randn(n, 16, device="cuda").bfloat16().requires_grad_() for n in (50, 1001))
targets = torch.arange(50, device="cuda")
names = ("log_sum_sq_probs", "mean_logits", "is_top1")
linear_logprobs(x, w, targets, softcap=5.0, stats=names, backend="cuda")[0].sum().backward()
bounds = torch.tensor([0, 4, 6], device="cuda")
grouped_logprobs(logits.detach().flatten(0, 1), targets[:6], cu_seqlens=bounds, group_size=2, backend="cuda")
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool, tmp_path):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    result = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
