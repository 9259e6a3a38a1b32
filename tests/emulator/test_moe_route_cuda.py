"""route and sort_by_expert of the backend cuda without a GPU: their kernels and launchers under the host emulator, behind
the autograd functions of the backend. T tokens, E experts, K experts per token, S rows.
"""

from __future__ import annotations

import pytest
import torch

import r1kernels
from r1kernels.moe import reference
from tests.support.emulated_routing import EmulatedRouting
from tests.support.forced import public_on
from tests.support.numerics import same_bits
from tests.support.routing_cases import FAMILIES, families, normal
from tests.support.routing_kernel import RoutingKernel, integers


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("moe_routing")


@pytest.fixture
def kernels(module):
    """The ops of the backend cuda take CPU tensors, by the emulator, while a test runs."""
    module.set_seed(0)
    emulated_ops = EmulatedRouting(module)
    library = torch.library.Library("r1kernels", "IMPL")
    emulated_ops.register(library)
    yield emulated_ops
    library._destroy()
    module.set_max_blocks(2**32 - 1)


@pytest.fixture
def backend(kernels):
    return "cuda"


class TestRoutingCuda(RoutingKernel):
    def test_many_experts(self, backend):
        self.check(backend, normal(1, 2048), **FAMILIES["deepseek-v3"])
        self.check(backend, normal(1, 600), **FAMILIES["olmoe"])

    @families
    def test_unaligned_arguments(self, backend, kernels, options):
        logits = normal(3, 21 if options.get("n_group", 1) == 1 else 20)
        plain = self.run(backend, logits, **options)
        kernels.offset = 1
        shifted = self.run(backend, logits, **options)
        assert all(same_bits(first, second) for first, second in zip(plain, shifted, strict=True))

    def test_more_tokens_than_a_grid_holds(self, backend, module):
        module.set_max_blocks(2)
        self.check(backend, normal(20, 16), **FAMILIES["deepseek-v3"])
        self.check(backend, normal(20, 16), **FAMILIES["olmoe"])

    @families
    def test_no_order_of_threads_moves_a_bit(self, backend, module, options):
        results = []
        for seed in range(3):
            module.set_seed(seed)
            results.append(self.run(backend, normal(9, 40), **options))
        for other in results[1:]:
            assert all(same_bits(first, second) for first, second in zip(results[0], other, strict=True))


MODELS = {  # E experts, and how many exponentials of float64 a token may cost: those of its weights, K or 2 K
    "deepseek-v3": (256, 16, {"top_k": 8, "score": "sigmoid", "n_group": 8, "topk_group": 4, "bias": True}),
    "sigmoid": (128, 16, {"top_k": 8, "score": "sigmoid"}),
    "qwen3": (128, 16, {"top_k": 8, "score": "softmax"}),
    "olmoe": (64, 16, {"top_k": 8, "score": "softmax", "normalize": False}),
    "deepseek-v2": (
        160,
        16,
        {"top_k": 6, "score": "softmax", "n_group": 8, "topk_group": 3, "normalize": False},
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_float64_is_for_the_experts_that_are_chosen(backend, module, model):
    """GPUs of consumers compute one value of float64 in the time of 64 of float32."""
    experts, most, options = MODELS[model]
    options = options | {"bias": normal(experts, seed=1) / 10 if "bias" in options else None}
    logits = normal(40, experts).requires_grad_()
    module.wide_exps()
    weights, indices, _ = public_on(backend, r1kernels.route, logits, **options)
    assert 0 < module.wide_exps() <= 40 * (most + 2)  # a pair that is too close has to be looked at again
    torch.autograd.grad(weights.sum(), logits)
    assert 0 < module.wide_exps() <= 40 * 5 * options["top_k"]
    _, expected, _ = r1kernels.route(logits, **options, backend="reference")
    assert torch.equal(indices, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steps", [1e-7, 1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_experts_that_are_close_are_in_the_order_of_their_exact_scores(backend, module, score, steps, bias):
    """Logits on a grid, of which some fall together in float32 scores and some are equal."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randint(-4, 5, (24, 40), generator=generator) * steps + 1).float()
    offsets = torch.randint(-2, 3, (40,), generator=generator) * steps if bias else None
    for n_group, topk_group in ((1, 1), (4, 2)):
        options = {"score": score, "bias": offsets, "n_group": n_group, "topk_group": topk_group}
        ours = public_on(backend, r1kernels.route, logits, 6, **options)
        expected = r1kernels.route(logits, 6, **options, backend="reference")
        assert torch.equal(ours[1], expected[1]), (n_group, topk_group)


# one block, and three launches; the counters of many experts do not fit in shared memory
@pytest.mark.parametrize(
    ("rows", "experts"), [(300, 5), (5000, 17), (4500, 300), pytest.param(300, 13000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_order_of_many(kernels, module, rows, experts, dtype):
    indices = integers(-1, experts + 2, rows)
    indices[: rows // 2] %= 4
    expected = reference.sorted_rows(indices, experts)
    for seed in range(1 if experts > 1000 else 2):
        module.set_seed(seed)
        ours = kernels.sort(indices, experts, dtype)
        assert ours[1].dtype == ours[2].dtype == dtype
        for part, exact in zip(ours, expected, strict=True):
            assert torch.equal(part.long(), exact.long())


def test_more_rows_than_a_grid_holds(kernels, module):
    module.set_max_blocks(2)
    indices = integers(0, 6, 7000)
    for part, exact in zip(kernels.sort(indices, 5), reference.sorted_rows(indices, 5), strict=True):
        assert torch.equal(part, exact)
