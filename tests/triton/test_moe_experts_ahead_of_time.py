"""The Triton kernels of the experts, compiled with every entry of the tuning tables for GPUs that are not here."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from r1kernels.moe import triton_experts as backend
from r1kernels.moe import tuning
from r1kernels.moe.experts import (
    NO_LORA,
    ExpertsBackwardCall,
    ExpertsCall,
    GemmBackwardCall,
    GemmCall,
    Lora,
    LoraBackward,
)
from tests.support import offline_triton

TABLES = sorted(Path(tuning.__file__).parent.glob("*.json"))
DTYPES = (torch.bfloat16, torch.float32)
ROWS_AN_EXPERT = (16, 64, 4096)  # one of each entry
# the gradient of the weights is the same code at both, and grouped_gemm's of many experts compiles it for 80
FEW = ((90, torch.bfloat16, 4096, ()), (80, torch.bfloat16, 64, ("weight_gradient_kernel",)))
MATRIX = [
    *FEW,
    *(
        pytest.param(*point, (), marks=pytest.mark.slow)
        for point in itertools.product(offline_triton.CAPABILITIES, DTYPES, ROWS_AN_EXPERT)
        if (*point, ()) not in FEW
    ),
]
EXPERTS, TOP_K = 4, 2
PRODUCTS = ("up_kernel", "rows_kernel", "down_backward_kernel", "weight_gradient_kernel")
# those of the sort have tests of their own
OTHERS = (
    "schedule_kernel",
    "clear_rest_kernel",
    "combine_kernel",
    "sum_parts_kernel",
)


@pytest.fixture
def table_of(monkeypatch):
    """Makes launches take the entries for a capability."""

    def choose(capability):
        def tile(kernel, device, dtype, rows, experts):
            return tuning.choose(
                kernel, "", offline_triton.CAPABILITIES[capability], dtype, -(-rows // experts)
            )

        monkeypatch.setattr(tuning, "tile", tile)

    return choose


SILU = (0, 1.0, math.inf, 0.0)  # activation, alpha, limit, shift
GELU = (1, 1.0, math.inf, 0.0)
CLAMPED = (0, 1.702, 7.0, 1.0)


RANK = 16


def low_rank(dtype, size):
    shapes = (RANK, size), (2 * size, RANK), (RANK, size), (size, RANK)
    return Lora(*(torch.empty(EXPERTS, *shape, dtype=dtype) for shape in shapes), 2.0)


def forward(rows, dtype, size, keep=True, gating=SILU, lora=NO_LORA):
    """The launches of moe_experts behind the sort."""
    hidden = torch.empty(rows // TOP_K, size, dtype=dtype)
    indices = torch.zeros(rows // TOP_K, TOP_K, dtype=torch.int64)
    weights = torch.empty(EXPERTS, 2 * size, size, dtype=dtype), torch.empty(EXPERTS, size, size, dtype=dtype)
    shares = torch.empty(rows // TOP_K, TOP_K)
    backend.moe_experts(ExpertsCall(hidden, indices, shares, *weights, *gating, False, keep, lora))


def backward(rows, dtype, size, gating=SILU, lora=NO_LORA):
    hidden = torch.empty(rows // TOP_K, size, dtype=dtype)
    weights = torch.empty(EXPERTS, 2 * size, size, dtype=dtype), torch.empty(EXPERTS, size, size, dtype=dtype)
    order = (torch.zeros(length, dtype=torch.int32) for length in (EXPERTS + 1, rows, rows))
    pre_activation = torch.empty(rows, 2 * size, dtype=dtype)
    scores = torch.empty(rows // TOP_K, TOP_K)
    backend.moe_experts_backward(
        ExpertsBackwardCall(
            hidden,
            hidden,
            scores,
            *weights,
            pre_activation,
            *order,
            *gating,
            False,
            *(True,) * 4,
            LoraBackward(*(lora is not NO_LORA,) * 4, lora),
        )
    )


@pytest.mark.parametrize(("capability", "dtype", "rows", "left_out"), MATRIX)
def test_every_entry_fits_and_uses_the_tensor_cores(tmp_path, table_of, capability, dtype, rows, left_out):
    table_of(capability)
    with offline_triton.compile_only(capability, left_out) as compiled:
        forward(rows * EXPERTS, dtype, 256)
        backward(rows * EXPERTS, dtype, 256)
    compiled = [kernel for kernel in compiled if kernel.name in PRODUCTS + OTHERS]
    names = [kernel.name for kernel in compiled if kernel.name in PRODUCTS]
    launched = [*PRODUCTS, "weight_gradient_kernel", "rows_kernel"]
    assert names == [name for name in launched if name not in left_out]
    for needs in offline_triton.resources(compiled, tmp_path):
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability], needs.name
        assert needs.stack_bytes == 0 and needs.spill_instructions == 0, needs.name
        if needs.name not in PRODUCTS:
            continue
        if dtype == torch.float32:
            assert "HMMA" not in needs.instructions and "HGMMA" not in needs.instructions, "tf32 loses digits"
        else:
            tall = rows > 16 or needs.name == "weight_gradient_kernel"  # wgmma has 64 rows
            wide = offline_triton.WIDE_PRODUCTS.get(capability, "HMMA")
            assert (wide if tall else "HMMA") in needs.instructions, needs.name
            assert offline_triton.serialised(needs.instructions) == 0, needs.name
        asynchronous = "LDGSTS" in needs.instructions or "UTMALDG" in needs.instructions
        assert asynchronous, f"{needs.name}: loads are not pipelined"


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS_AN_EXPERT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", offline_triton.CAPABILITIES)
def test_low_rank_additions_fit_and_use_the_tensor_cores(tmp_path, table_of, capability, dtype, rows):
    table_of(capability)
    with offline_triton.compile_only(capability) as compiled:
        forward(rows * EXPERTS, dtype, 256, lora=low_rank(dtype, 256))
        backward(rows * EXPERTS, dtype, 256, lora=low_rank(dtype, 256))
    for needs in offline_triton.resources(compiled, tmp_path):
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability], needs.name
        assert needs.stack_bytes <= (16 if dtype == torch.float32 else 0), needs.name  # a few addresses
        if needs.name in PRODUCTS:
            on_tensor_cores = any(name in needs.instructions for name in ("HMMA", "HGMMA"))
            assert on_tensor_cores == (dtype != torch.float32), needs.name


@pytest.mark.parametrize("capability", [90, pytest.param(100, marks=pytest.mark.slow)])
def test_the_loads_of_a_tile_begin_under_the_epilogue_of_the_one_before(table_of, capability):
    """One loop over the depths of all tiles; where a product has no depth, a loop without loads runs the epilogues."""
    table_of(capability)
    with offline_triton.compile_only(capability) as compiled:
        forward(4096 * EXPERTS, torch.bfloat16, 256)
        backward(4096 * EXPERTS, torch.bfloat16, 256)
        gemm = (torch.empty(1 << 14, 256), torch.empty(EXPERTS, 256, 256))
        offsets = torch.zeros(EXPERTS + 1, dtype=torch.int32)
        backend.grouped_gemm(GemmCall(*(each.bfloat16() for each in gemm), offsets, False, False))
    names = ["up_kernel", "rows_kernel", "down_backward_kernel", "rows_kernel", "rows_kernel"]
    kernels = [kernel for kernel in compiled if kernel.name in names]
    assert [kernel.name for kernel in kernels] == names
    *joined, with_tail = [kernel.asm["ttgir"] for kernel in kernels]
    for code in joined:
        depthless, _, rest = code.partition("} else {")
        assert "scf.if" in depthless and depthless.count("scf.for") == 1 and "async_tma_copy" not in depthless
        assert rest.count("scf.for") == 1 and "async_tma_copy" in rest
    # the depth of rows of no expert is none, that of the others is not: two loops, one inside the other
    assert "scf.if" not in with_tail.partition("scf.for")[0] and with_tail.count("scf.for") == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", offline_triton.CAPABILITIES)
def test_odd_sizes_take_pointers_and_fit(tmp_path, table_of, capability, dtype):
    table_of(capability)
    with offline_triton.compile_only(capability) as compiled:
        for gating in (GELU, CLAMPED):
            forward(4096 * EXPERTS, dtype, 255, gating=gating)
            backward(4096 * EXPERTS, dtype, 255, gating=gating)
    for needs in offline_triton.resources(compiled, tmp_path):
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability], needs.name
        assert needs.stack_bytes <= (16 if dtype == torch.float32 else 0), needs.name  # a few predicates
        assert "UTMALDG" not in needs.instructions


@pytest.mark.parametrize("experts", [64, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_grouped_gemm_of_many_experts_fits(tmp_path, table_of, capability, experts):
    table_of(capability)
    x, weight = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(experts, 64, 64, dtype=torch.bfloat16)
    offsets = torch.zeros(experts + 1, dtype=torch.int32)
    with offline_triton.compile_only(capability) as compiled:
        backend.grouped_gemm(GemmCall(x, weight, offsets, False, False))
        backend.grouped_gemm_backward(GemmBackwardCall(x, x, weight, offsets, False, True, True))
    names = {kernel.name for kernel in compiled}
    assert names == {"ascend_kernel", "schedule_kernel", "rows_kernel", "weight_gradient_kernel"}
    for needs in offline_triton.resources(compiled, tmp_path):
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability], needs.name
        assert needs.stack_bytes <= 8 and needs.spill_instructions == 0, needs.name  # a predicate


def test_no_number_of_tokens_compiles_a_kernel_anew(table_of):
    table_of(80)
    with offline_triton.specialise_only(80) as launched:
        for rows in (520, 1026, 2048):  # more than 64 rows per expert: the same entries
            forward(rows, torch.bfloat16, 64)
            backward(rows, torch.bfloat16, 64)
    kernels = [kernel for kernel in launched if kernel[0] in PRODUCTS + OTHERS]
    assert set(PRODUCTS) < {name for name, _ in kernels}
    assert set(kernels) == set(kernels[: len(kernels) // 3])


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_tables_are_well_formed(path):
    """Entries in rising order of rows per expert; the default serves every kernel, class and kind, any number of rows."""
    table = json.loads(path.read_text())
    if path.stem == "default":
        assert set(table) == set(tuning.KERNELS)
        assert all(set(classes) == {"sm_80", "sm_86", "sm_90"} for classes in table.values())
    for classes in table.values():
        for kinds in classes.values():
            assert path.stem != "default" or set(kinds) == {"half", "float32"}
            for entries in kinds.values():
                limits = [entry["rows_an_expert"] for entry in entries]
                assert path.stem != "default" or limits[-1] is None
                numbers = [limit for limit in limits if limit is not None]
                assert numbers == sorted(set(numbers)) and None not in limits[:-1]
                keys = {"rows_an_expert", "tile", "group", "warps", "stages", "descriptors"}
                assert all(set(entry) == keys for entry in entries)


def test_the_entry_of_a_call():
    def choose(rows, name="NVIDIA H200", capability=(9, 0)):
        return tuning.choose("rows", name, capability, torch.bfloat16, rows)

    assert choose(1).rows == choose(16).rows == 16
    assert choose(17) == choose(64) and choose(65) == choose(100_000)
    assert choose(9, "some GPU to come", (13, 7)).stages > 0
