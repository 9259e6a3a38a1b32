"""The Triton kernels of the router and of the order of experts, compiled for GPUs that are not here: they compile, fit and do
not spill."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from r1kernels.moe import triton_routing as backend
from r1kernels.moe import triton_sort
from r1kernels.moe.routing import SCORES, Choice, RouteBackwardCall, RouteCall
from tests.support import offline_triton

ROUTERS = (  # experts, top_k, score, n_group, normalize
    (256, 8, "sigmoid", 8, True),
    (128, 8, "softmax", 1, True),
    (64, 8, "softmax", 1, False),
    (512, 10, "softmax", 1, True),
    (2048, 16, "softmax", 1, False),
    (256, 6, "sqrt_softplus", 1, True),
)
FEW = ((90, ROUTERS[0]), (80, ROUTERS[2]))
MATRIX = [
    pytest.param(*point, marks=[] if point in FEW else pytest.mark.slow)
    for point in itertools.product(offline_triton.SHARED_BYTES, ROUTERS)
]


def launch(experts, top_k, score, n_group, normalize, tokens=3, dtype=torch.bfloat16):
    logits, bias = torch.zeros(tokens, experts, dtype=dtype), torch.zeros(experts)
    groups = (n_group, (n_group + 1) // 2)
    place, two_best = SCORES.index(score), score != "softmax"
    call = RouteCall(logits, top_k, place, normalize, 1e-20, 2.5, Choice(False, bias, *groups, two_best))
    weights, indices, _ = backend.route(call)
    backend.route(call._replace(choice=Choice(False, None, *groups, two_best, indices)))
    backend.route_backward(RouteBackwardCall(weights, logits, indices, place, normalize, 1e-20, 2.5))


def assert_light(compiled, folder, capability):
    for needs in offline_triton.resources(compiled, folder):
        assert needs.stack_bytes == 0 and needs.spill_instructions == 0, needs.name
        assert needs.shared_bytes <= 48 << 10 <= offline_triton.SHARED_BYTES[capability]


@pytest.mark.parametrize(("capability", "router"), MATRIX)
def test_every_kernel_of_the_router_fits_and_does_not_spill(tmp_path, capability, router):
    with offline_triton.compile_only(capability) as compiled:
        launch(*router)
    assert [kernel.name for kernel in compiled] == ["route_kernel"] * 2 + ["route_backward_kernel"]
    assert_light(compiled, tmp_path, capability)


@pytest.mark.parametrize(
    "capability",
    [pytest.param(c, marks=[] if c == 90 else pytest.mark.slow) for c in offline_triton.SHARED_BYTES],
)
@pytest.mark.parametrize("dtype", [torch.int64, pytest.param(torch.int32, marks=pytest.mark.slow)], ids=str)
def test_every_kernel_of_the_sort_fits_and_does_not_spill(tmp_path, capability, dtype):
    with offline_triton.compile_only(capability) as compiled:
        for rows in (300, 5000):
            triton_sort.sort_rows(torch.zeros(rows, dtype=torch.int64), 256, dtype)
    names = ["sort_kernel", "count_kernel", "scan_kernel", "place_kernel"]
    assert [kernel.name for kernel in compiled] == names
    assert_light(compiled, tmp_path, capability)


def test_no_number_of_tokens_compiles_a_kernel_anew():
    sizes = (1, 2, 16, 33, 4096)
    with offline_triton.specialise_only(80) as launched:
        for tokens in sizes:
            launch(8, 2, "softmax", 1, True, tokens)
            for rows in (tokens, 2**14 + tokens):
                triton_sort.sort_rows(torch.zeros(rows, dtype=torch.int64), 8, torch.int64)
    assert len(set(launched)) == 3 + 4
