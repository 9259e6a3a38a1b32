"""route and sort_by_expert on a GPU: kernel backends against the CPU and the reference, streams, graphs, syncs, sizes.

Written for hardware that most machines lack: `pytest -m gpu`. T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import pytest
import torch

from r1kernels.moe import route, sort_by_expert
from tests.support.gpu_streams import on_a_side_stream, without_waiting
from tests.support.numerics import same_bits
from tests.support.routing_cases import FAMILIES, families, normal
from tests.support.routing_kernel import RoutingKernel, integers

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

V3 = {"top_k": 8, "n_group": 8, "topk_group": 4, "scale": 2.5}
MODELS = {
    "deepseek-v3": (256, V3),
    "qwen3": (128, {"top_k": 8, "score": "softmax"}),
    "qwen3-next": (512, {"top_k": 10, "score": "softmax"}),
    "olmoe": (64, {"top_k": 8, "score": "softmax", "normalize": False}),
    "mixtral": (8, {"top_k": 2, "score": "softmax"}),
}


class TestRoutingOnGpu(RoutingKernel):
    device = "cuda"
    tokens = 100

    @pytest.mark.parametrize("model", MODELS)
    def test_many_tokens(self, backend, model):
        experts, options = MODELS[model]
        self.check(backend, normal(4096, experts), **options)
        self.check(backend, (4 * normal(4096, experts)).round() / 4, **options)  # many ties

    @pytest.mark.parametrize("experts", [600, 2048])
    def test_many_experts(self, backend, experts):
        for options in FAMILIES.values():
            self.check(backend, normal(50, experts), **options)

    @pytest.mark.parametrize(("rows", "experts"), [(513, 8), (32768, 256), (2_000_003, 512), (5000, 20_000)])
    def test_order_of_many(self, backend, rows, experts):
        self.check_order(backend, integers(-1, experts + 2, rows), experts)
        self.check_order(backend, torch.full((rows,), experts - 1), experts)


def run(backend, logits, options):
    leaf = logits.detach().requires_grad_()
    routing = route(leaf, **options, backend=backend)
    (grad,) = torch.autograd.grad(routing.weights.square().sum(), leaf)
    return (*routing, grad)


def assert_same(first, second):
    assert all(same_bits(one.cpu(), other.cpu()) for one, other in zip(first, second, strict=True))


@families
def test_nothing_waits_for_the_gpu(backend, options):
    logits, bias = normal(100, 40).cuda(), normal(40, seed=1).cuda()
    indices = integers(-1, 42, 3000).cuda()
    run(backend, logits, options | {"bias": bias})
    with torch.no_grad():
        sort_on(backend, indices)
    with without_waiting():
        run(backend, logits, options | {"bias": bias})
        for rows in (100, 3000):
            sort_on(backend, indices[:rows])


def sort_on(backend, indices, experts=40):
    return getattr(torch.ops.r1kernels, f"sort_by_expert_{backend}")(indices, experts)


@families
def test_a_graph_captures_and_replays(backend, options):
    source = normal(300, 40).cuda()
    logits = source.clone()

    def both():
        results = run(backend, logits, options)
        return *results, *sort_on(backend, results[1].flatten())

    both()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for shift in (0.0, 1.0):
        logits.copy_(source.roll(int(shift), 1) + shift)
        graph.replay()
        results = [value.clone() for value in captured]
        assert_same(results, both())


def test_a_side_stream_is_respected(backend):
    logits = normal(300, 40).cuda()
    expected = run(backend, logits, FAMILIES["qwen3"])
    results = on_a_side_stream(logits, lambda late: run(backend, late, FAMILIES["qwen3"]))
    assert_same(results, expected)


@families
def test_compiled(backend, options):
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: route(z, **options, backend=backend), fullgraph=True)
    for tokens in (12, 40):
        logits = normal(tokens, 40).cuda().requires_grad_()
        traced, eager = compiled(logits), route(logits, **options, backend=backend)
        assert_same([part.detach() for part in traced], [part.detach() for part in eager])
        (first,) = torch.autograd.grad(traced.weights.square().sum(), logits)
        (second,) = torch.autograd.grad(eager.weights.square().sum(), logits)
        torch.testing.assert_close(first, second)


def test_the_public_sort_takes_what_nobody_looked_at(backend):
    indices = torch.tensor([[2, 7, 0], [-1, 1, 3]], device="cuda")
    order = sort_on(backend, indices.flatten(), 3)
    assert order[0].tolist() == [0, 1, 2, 3] and order[1].tolist() == [2, 4, 0, 1, 3, 5]
    for ours, expected in zip(sort_by_expert(indices, 3), order, strict=True):
        assert torch.equal(ours, expected)
