"""linear_logprobs on a GPU: both backends, and what only a GPU can show (streams, graphs, syncs, sizes, real bits).

Written for hardware that most machines lack: `pytest -m gpu`. N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels import linear_grouped_logprobs, linear_logprobs
from tests.support.gpu_streams import on_a_side_stream, without_waiting
from tests.support.numerics import assert_as_exact_as, same_bits

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = {
    "plain": {},
    "all": {"bias": True, "logit_scale": 0.7, "softcap": 9.0},
}


def random_case(tokens, vocabulary, width, dtype=torch.bfloat16):
    """(hidden, weight, targets) on the GPU; logits of a few nats."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = 3 * width**-0.5 * torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden.to("cuda", dtype), weight.to("cuda", dtype), targets.cuda()


def head_of(name, vocabulary, dtype):
    head = dict(HEADS[name])
    if head.pop("bias", False):
        values = torch.randn(vocabulary, generator=torch.Generator().manual_seed(9))
        head["bias"] = values.to("cuda", dtype)
    return head


def values_and_gradients(hidden, weight, targets, **options):
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    logp, entropy = linear_logprobs(*leaves, targets, temperature=0.8, return_entropy=True, **options)
    gradients = torch.autograd.grad((logp + 0.1 * entropy).sum(), leaves)
    return logp.detach(), entropy.detach(), *gradients


def as_people_write_it(hidden, weight, targets, bias=None, logit_scale=1.0, softcap=None):
    """(logp, entropy, dX, dW), the softmax in float32 of logits in the dtype of the inputs; in float64 the truth."""
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    logits = logit_scale * torch.nn.functional.linear(*leaves, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = torch.log_softmax(wide / 0.8, dim=-1)
    logp = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    gradients = torch.autograd.grad((logp + 0.1 * entropy).sum(), leaves)
    return logp.detach(), entropy.detach(), *gradients


@pytest.mark.parametrize("save_logits", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(1, 1, 8), (65, 1003, 72), (300, 5000, 256)], ids=str)
def test_as_exact_as_eager(backend, shape, head, dtype, save_logits):
    case = random_case(*shape, dtype)
    head = head_of(head, shape[1], dtype)
    ours = values_and_gradients(*case, backend=backend, save_logits=save_logits, **head)
    peer = as_people_write_it(*case, **head)
    wide = {name: value.double() if name == "bias" else value for name, value in head.items()}
    truth = as_people_write_it(case[0].double(), case[1].double(), case[2], **wide)
    for one, other, exact in zip(ours, peer, truth, strict=True):
        assert_as_exact_as(one.cpu(), other.cpu(), exact.cpu(), one.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_head_is_as_exact_as_eager(backend, dtype):
    """The log-prob alone, and hidden states alone have a gradient: its slope is worked out in the forward."""
    hidden, weight, targets = random_case(65, 1003, 72, dtype)

    def run(hidden, weight, function):
        hidden = hidden.detach().clone().requires_grad_()
        logp = function(hidden, weight)
        return logp.detach(), *torch.autograd.grad(logp.square().sum(), hidden)

    def eager(hidden, weight):
        logits = torch.nn.functional.linear(hidden, weight)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(wide, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    ours = run(hidden, weight, lambda x, w: linear_logprobs(x, w, targets, backend=backend))
    truth = run(hidden.double(), weight.double(), eager)
    for one, other, exact in zip(ours, run(hidden, weight, eager), truth, strict=True):
        assert_as_exact_as(one.cpu(), other.cpu(), exact.cpu(), one.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance_by_bytes(backend, dtype):
    """The same bits for any N, order, chunk size and layout, with and without a gradient, twice."""
    hidden, weight, targets = random_case(1000, 3000, 512, dtype)
    options = {"return_entropy": True, "batch_invariant": True, "backend": backend}
    together = linear_logprobs(hidden, weight, targets, **options)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).cuda()
    others = {
        "again": linear_logprobs(hidden, weight, targets, **options),
        "chunks": linear_logprobs(hidden, weight, targets, chunk_size=130, **options),
        "gradient": linear_logprobs(hidden.clone().requires_grad_(), weight, targets, **options),
    }
    shuffled = linear_logprobs(hidden[order], weight, targets[order], **options)
    for index in (0, 1):
        for name, other in others.items():
            assert same_bits(together[index].cpu(), other[index].detach().cpu()), name
        assert same_bits(together[index][order].cpu(), shuffled[index].cpu())
    for rows in (slice(0, 1), slice(500, 502), slice(63, 70), slice(1, 130)):
        few = linear_logprobs(hidden[rows], weight, targets[rows], **options)
        for index in (0, 1):
            assert same_bits(together[index][rows].cpu(), few[index].cpu()), rows


@pytest.mark.parametrize("save_logits", [True, False])
def test_twice_the_same_bits(backend, save_logits):
    case = random_case(300, 5000, 256)
    first, second = (values_and_gradients(*case, backend=backend, save_logits=save_logits) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert same_bits(one.cpu(), other.cpu())


@pytest.mark.parametrize("save_logits", [True, False])
def test_nothing_waits_for_the_gpu(backend, save_logits):
    hidden, weight, targets = random_case(300, 5000, 256)
    packed = torch.arange(0, 301, 50, device="cuda")

    def calls():
        values_and_gradients(hidden, weight, targets, backend=backend, save_logits=save_logits)
        with torch.no_grad():
            linear_logprobs(hidden, weight, targets, stats=("is_top1", "mean_logits"), backend=backend)
            for reduce in ("sum", "mean", "none"):
                linear_grouped_logprobs(
                    hidden, weight, targets, cu_seqlens=packed, group_size=2, reduce=reduce, backend=backend
                )

    calls()
    with without_waiting():
        calls()


def test_a_side_stream_is_respected(backend):
    hidden, weight, targets = random_case(300, 5000, 256)
    expected = linear_logprobs(hidden, weight, targets, backend=backend)
    logp = on_a_side_stream(hidden, lambda late: linear_logprobs(late, weight, targets, backend=backend))
    assert same_bits(logp.cpu(), expected.cpu())


@pytest.mark.parametrize("save_logits", [True, False])
def test_a_graph_captures_and_replays(backend, save_logits):
    source, weight, targets = random_case(300, 5000, 256)
    hidden = source.clone().requires_grad_()
    weight.requires_grad_()

    def values():
        logp = linear_logprobs(hidden, weight, targets, backend=backend, save_logits=save_logits)
        return logp.detach(), *torch.autograd.grad(logp.sum(), (hidden, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(
        stream
    ):  # the library takes its workspace, and Triton compiles, before the capture
        values()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values()
    for factor in (1.0, -0.5):
        with torch.no_grad():
            hidden.copy_(source * factor)
        graph.replay()
        for one, other in zip(captured, values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.large
def test_more_than_2_to_the_31_logits(backend):
    """N V passes 2^31; no tile of all of them exists. The last tokens have the bits that they have in fewer."""
    tokens, vocabulary = 20_000, 120_000
    hidden, weight, targets = random_case(tokens, vocabulary, 64)
    options = {"backend": backend, "batch_invariant": True, "return_entropy": True}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, entropy = linear_logprobs(hidden, weight, targets, **options)
    assert torch.cuda.max_memory_allocated() - before < tokens * vocabulary
    few = linear_logprobs(hidden[-70:], weight, targets[-70:], **options)
    assert same_bits(logp[-70:].cpu(), few[0].cpu()) and same_bits(entropy[-70:].cpu(), few[1].cpu())
    exact = torch.log_softmax(hidden[-70:].double() @ weight.double().T, dim=-1)
    expected = exact.gather(-1, targets[-70:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logp[-70:].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_forward_alone_keeps_no_tile():
    """Extra memory of Triton's forward: three numbers per token and block of columns, far below the logits."""
    pytest.importorskip("triton", reason="Triton is not installed")
    hidden, weight, targets = random_case(4096, 50_000, 256)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_logprobs(hidden, weight, targets, return_entropy=True, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 4096 * 50_000 * 4 / 30
