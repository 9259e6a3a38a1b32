"""Which backend serves tensors of GPUs that are not here, by builds that are not here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import r1kernels
from r1kernels import backends, devices, extension
from r1kernels.grpo import loss, one_pass
from r1kernels.logprob import linear, triton_linear
from r1kernels.logprob.token import Rows
from r1kernels.moe.experts import ExpertsCall, GemmCall


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, built, triton, problem): makes torch know that GPU, and the extension hold kernels for these."""
    monkeypatch.setattr(extension, "_problems", {})

    def make(capability, built="80 86 89 90 100 120", triton=True, problem=""):
        properties = SimpleNamespace(major=capability[0], minor=capability[1], total_memory=80 << 30)
        names = built.split()
        monkeypatch.setattr(devices, "_gpus", {})
        monkeypatch.setattr(devices, "_ready", set())
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(
            devices, "_BUILT", sorted(divmod(int(name), 10) for name in names if name != "90a")
        )
        monkeypatch.setattr(devices, "_NATIVE", {9} if "90a" in names else set())
        monkeypatch.setattr(devices, "_no_cuda", None)
        monkeypatch.setattr(devices, "_NO_TRITON", None if triton else "no Triton")
        monkeypatch.setattr(extension, "_module", SimpleNamespace(cuda_problem=lambda device: problem))

    return make


def on_gpu(*shape, dtype=torch.bfloat16):
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), "80 86 89 90 100 120", True),
        ((8, 9), "80", True),  # a later minor runs the binary
        ((8, 0), "86", False),
        ((8, 0), "90", False),
        ((9, 0), "80", True),  # by PTX
        ((11, 0), "80 86 89 90 100 120", False),  # no binary, and the PTX is of a later one
        ((10, 3), "80 86 89 90 100 120", True),
        ((12, 1), "80 86 89 90 100 120", True),
        ((13, 7), "80 86 89 90 100 120", True),
        ((11, 0), "80 90", True),
    ],
)
def test_cuda_refuses_a_gpu_that_it_was_not_built_for(gpu, capability, built, runs):
    gpu(capability, built)
    reasons = devices.cuda("x", on_gpu(2))
    assert (reasons == []) is runs
    if not runs:
        number = f"sm_{capability[0]}{capability[1]}"
        assert number in reasons[0] and f"sm_{built.split()[0]}" in reasons[0]


def test_a_gpu_that_the_build_does_not_know_is_served_by_triton(gpu):
    gpu((11, 0))
    logits = on_gpu(4, 8, dtype=torch.float32)
    call = r1kernels.moe.routing.RouteCall(logits, 2, 1, True, 0.0, 1.0)
    assert backends.choose("route", None, call).name == "triton"


def test_a_driver_that_is_too_old_is_a_reason_and_is_asked_once(gpu, monkeypatch):
    gpu((9, 0))
    asked = []

    def cuda_problem(device):
        asked.append(device)
        return "CUDA driver version is insufficient for CUDA runtime version"

    monkeypatch.setattr(extension, "_module", SimpleNamespace(cuda_problem=cuda_problem))
    for _ in range(3):
        (reason,) = devices.cuda("x", on_gpu(2))
        assert "driver version is insufficient" in reason
    assert asked == [0]


def test_torch_is_asked_for_the_properties_of_a_gpu_once(gpu, monkeypatch):
    gpu((9, 0), "90 90a")
    asked = []
    found = torch.cuda.get_device_properties()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or found)
    for _ in range(3):
        assert devices.cuda("x", on_gpu(2)) == devices.triton("x", on_gpu(2)) == []
        assert devices.grouped_products_yield(on_gpu(2)) == ""
    assert asked == [0]


def functions_entered(call):
    """How many functions of the package a call enters."""
    entered = 0

    def count(frame, event, argument):
        nonlocal entered
        entered += event == "call" and "/r1kernels/" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def test_to_choose_cuda_takes_no_more_steps_than_to_choose_the_cpu(gpu):
    """A GPU's kernel of a small batch waits for the host."""
    gpu((9, 0))
    steps = {}
    for logp in (torch.empty(2, 3), on_gpu(2, 3, dtype=torch.float32)):
        tokens = loss.Tokens(logp, *[None] * (len(loss.Tokens._fields) - 1))
        call = loss.LossCall(tokens, None, "token", None)
        chosen = backends.choose("grpo_loss", None, call).name  # the first call asks the driver
        steps[chosen] = functions_entered(lambda call=call: backends.choose("grpo_loss", None, call))
    assert steps.keys() == {"cpu", "cuda"} and 0 < steps["cuda"] <= steps["cpu"], steps


def test_the_answer_of_the_driver_stands_in_a_compiled_graph(gpu):
    gpu((9, 0), problem="too old")
    compiled = torch.compile(lambda x: x + len(extension.cuda_problem(0)), fullgraph=True, backend="eager")
    assert compiled(torch.ones(())) == 1  # no one has asked
    assert extension.cuda_problem(0) == "too old"
    assert compiled(torch.ones(())) == 8


SILU = (0, 1.0, float("inf"), 0.0)


def experts(dtype):
    hidden, indices = on_gpu(8, 16, dtype=dtype), on_gpu(8, 2, dtype=torch.int64)
    weights = on_gpu(8, 2, dtype=torch.float32)
    return ExpertsCall(
        hidden,
        indices,
        weights,
        on_gpu(4, 32, 16, dtype=dtype),
        on_gpu(4, 16, 16, dtype=dtype),
        *SILU,
        False,
        False,
    )


def gemm(dtype):
    return GemmCall(
        on_gpu(8, 16, dtype=dtype), on_gpu(4, 16, 16, dtype=dtype), on_gpu(5, dtype=torch.int32), False, False
    )


ALL, WITH_HOPPER = "80 86 89 90 100 120", "80 86 89 90 90a 100 120"


@pytest.mark.parametrize(
    ("capability", "built", "dtype", "chosen"),
    [
        ((9, 0), ALL, torch.bfloat16, "triton"),  # without CUTLASS
        ((9, 0), ALL, torch.float16, "triton"),
        ((9, 0), ALL, torch.float32, "cuda"),
        ((9, 0), WITH_HOPPER, torch.bfloat16, "cuda"),
        ((10, 0), WITH_HOPPER, torch.bfloat16, "triton"),
        ((10, 3), WITH_HOPPER, torch.bfloat16, "triton"),
        ((8, 0), ALL, torch.bfloat16, "cuda"),
        ((12, 0), ALL, torch.bfloat16, "cuda"),
    ],
)
@pytest.mark.parametrize(("op", "call"), [("moe_experts", experts), ("grouped_gemm", gemm)])
def test_grouped_products_run_where_the_tensor_cores_are_used_whole(
    gpu, op, call, capability, built, dtype, chosen
):
    gpu(capability, built)
    assert backends.choose(op, None, call(dtype)).name == chosen


@pytest.mark.parametrize("op", ["moe_experts", "grouped_gemm"])
def test_portable_grouped_products_serve_where_nothing_faster_does(gpu, op):
    gpu((9, 0), ALL)
    call = experts(torch.bfloat16) if op == "moe_experts" else gemm(torch.bfloat16)
    assert backends.choose(op, "cuda", call).name == "cuda"  # who asks for it gets it
    gpu((9, 0), ALL, triton=False)
    assert backends.choose(op, None, call).name == "cuda"


class Captured(Exception):
    """The call that would have gone to a kernel."""


def raise_call(backend, call):
    raise Captured(call)


@pytest.mark.parametrize(("tokens", "kept"), [(440, True), (8192, True), (32768, False)])
def test_logits_are_kept_for_the_backward_as_the_memory_of_the_gpu_allows(gpu, monkeypatch, tokens, kept):
    """V = 151,936: 8,192 tokens have 5.0 GB of logits, a sixteenth of 80 GiB is 5.4 GB."""
    gpu((9, 0))
    monkeypatch.setattr(linear, "_recorded", raise_call)
    hidden, weight = on_gpu(tokens, 64).requires_grad_(), on_gpu(151_936, 64).requires_grad_()
    rows = Rows(None, 1.0, 0.0, on_gpu(tokens, dtype=torch.int64), None, 1.0, -100, 0, 151_936)
    nothing = linear.LinearCall._make([None] * len(linear.LinearCall._fields))
    with pytest.raises(Captured) as raised:
        linear.on_kernels("cuda", nothing._replace(hidden=hidden, weight=weight, rows=rows))
    assert raised.value.args[0].save_logits is kept


def test_a_gpu_takes_larger_chunks_than_a_cpu(gpu):
    """Each chunk reads and writes the whole gradient of the head."""
    gpu((9, 0))
    engine = one_pass.cuda.ENGINE
    sizes = [
        one_pass._chunk_size(engine, hidden, 151_936)
        for hidden in (on_gpu(8192, 64), torch.empty(8192, 64, device="meta"))
    ]
    assert sizes[0] == 8192 and sizes[1] < 2048


@pytest.fixture
def products_of_float32():
    """products_of_float32(precision): PyTorch's switch for TF32, which stands again as it was behind the test."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    yield lambda precision: setattr(switch, "fp32_precision", precision)
    switch.fp32_precision = before


@pytest.mark.parametrize(("setting", "forward_in_triton"), [("tf32", False), ("ieee", True)])
def test_float32_is_tf32_in_both_directions_or_in_none(
    monkeypatch, products_of_float32, setting, forward_in_triton
):
    """The GEMMs of the backward follow PyTorch's switch; the Triton kernel of the forward is float32 in earnest."""
    products_of_float32(setting)
    monkeypatch.setattr(triton_linear, "forward_into", lambda *arguments: None)
    rows = Rows(None, 1.0, 0.0, torch.zeros(4, dtype=torch.int64), None, 1.0, -100, 0, 9)
    call = linear.LinearCall(torch.zeros(4, 8), torch.zeros(9, 8), rows, True, False, 0, False, True)
    assert (triton_linear.forward(call) is not None) is forward_in_triton
