"""grpo_loss and group_advantages on a GPU: kernel backends against the reference, streams, graphs, syncs, sizes.

Written for hardware that most machines lack: `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels.grpo import group_advantages, grpo_loss
from tests.support.gpu_streams import on_a_side_stream, without_waiting
from tests.support.grpo_loss_kernel import GrpoLossKernel, gradients, random_call
from tests.support.numerics import same_bits

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)


class TestGrpoLossOnGpu(GrpoLossKernel):
    device = "cuda"
    long = 9001


def gpu_call(seed=0, tokens=3000, packed=False, **changes):
    arguments, keywords = random_call(seed, 8, tokens, packed)
    moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in keywords.items()}
    return [value.cuda() for value in arguments], moved | changes


def run(backend, arguments, keywords):
    output, grads = gradients(
        lambda *values, **options: grpo_loss(*values, **options, backend=backend), arguments, keywords
    )
    return output.metrics.tensor, *grads


def assert_same(first, second):
    assert all(same_bits(one.cpu(), other.cpu()) for one, other in zip(first, second, strict=True))


CALLS = [
    {"ratio": "token"},
    {"ratio": "sequence"},
    {"variant": "gmpo"},
    {"reduction": "token", "num_tokens": 99.0},
]


@pytest.mark.parametrize("changes", CALLS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_gpu(backend, packed, changes):
    arguments, keywords = gpu_call(packed=packed, **changes)
    rewards = torch.randn(32, device="cuda")
    run(backend, arguments, keywords)
    with without_waiting():
        run(backend, arguments, keywords)
        group_advantages(rewards, group_size=8, backend=backend)


@pytest.mark.parametrize("changes", CALLS, ids=str)
def test_a_graph_captures_and_replays(backend, changes):
    arguments, keywords = gpu_call(**changes)
    source = arguments[0].clone()
    run(backend, arguments, keywords)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(backend, arguments, keywords)
    for shift in (0.0, 0.1):
        arguments[0].copy_(source + shift)
        graph.replay()
        results = [value.clone() for value in captured]
        assert_same(results, run(backend, arguments, keywords))


def test_a_side_stream_is_respected(backend):
    arguments, keywords = gpu_call(ratio="sequence")
    expected = run(backend, arguments, keywords)
    results = on_a_side_stream(arguments[0], lambda late: run(backend, [late, *arguments[1:]], keywords))
    assert_same(results, expected)


@pytest.mark.parametrize("changes", CALLS, ids=str)
def test_two_streams_at_once_do_not_share_a_counter(backend, changes):
    calls = [gpu_call(seed, 9001, **changes) for seed in range(2)]
    expected = [run(backend, *call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(backend, *call))
        torch.cuda.synchronize()
        for result, exact in zip(results, expected, strict=True):
            assert_same(result, exact)


def test_a_million_tokens(backend):
    arguments, keywords = gpu_call(tokens=2**17)
    ours, *grads = run(backend, arguments, keywords)
    exact, *exact_grads = run("reference", arguments, keywords)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    for one, other in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(backend, scale):
    rewards = torch.randn(1024, device="cuda").round()
    ids = torch.randint(0, 64, (1024,), device="cuda")
    for groups in ({"group_size": 16}, {"group_ids": ids}):
        ours = group_advantages(rewards, **groups, scale=scale, backend=backend)
        torch.testing.assert_close(
            ours, group_advantages(rewards, **groups, scale=scale, backend="reference")
        )
